# One image for every role: `api`, `worker`, `migrate`, `keys`, `audit` … are arguments of its entry point.
#
#   docker build --build-arg GIT_REVISION=$(git rev-parse HEAD) -t agent-service .
#
# PYTHON: name the base by its digest for builds that must be repeatable. Where packages come from a private index, give
# pip's configuration as a secret, which no layer keeps: --secret id=pip.conf,src=$HOME/.config/pip/pip.conf
ARG PYTHON=python:3.13-slim-trixie

FROM ${PYTHON} AS build
# hadolint ignore=DL3008
RUN apt-get update -qq && apt-get install -qq --no-install-recommends binutils >/dev/null
WORKDIR /build
RUN python -m venv --without-pip /opt/agent-service
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python -m pip --python /opt/agent-service/bin/python install \
        --disable-pip-version-check --no-compile --only-binary=:all: --require-hashes --requirement requirements.lock \
    # A fifth of it all is what debuggers of C read.
    && find /opt/agent-service -name '*.so*' -type f -exec strip --strip-debug {} +
COPY deploy/image/agent-service deploy/image/healthcheck /opt/agent-service/bin/
COPY migrations migrations
COPY worker worker
COPY app app
# Bytecode is made here, and never looked at again whether it is current: the file system may be read-only, and a start
# should not have to ask for thousands of times.
RUN packages="$(/opt/agent-service/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && cp -R app worker migrations "$packages/" \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash "$packages" \
    && chmod 0755 /opt/agent-service/bin/agent-service /opt/agent-service/bin/healthcheck

FROM ${PYTHON}
LABEL org.opencontainers.image.title="agent-service" \
      org.opencontainers.image.description="Runs model-and-tool agents: an API that takes runs, workers that execute them."
# What an unset AUDIT_ANCHOR means is a file in the working directory: a volume, where it is to stay.
RUN install -d -o 10001 -g 10001 /var/lib/agent-service
WORKDIR /var/lib/agent-service
COPY --from=build /opt/agent-service /opt/agent-service
ENV PATH=/opt/agent-service/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    API_HOST=0.0.0.0 \
    API_PORT=8000 \
    WORKER_HEALTH_PORT=8001
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=4s --start-period=30s --retries=3 CMD ["healthcheck"]
# Last, because it is another one each time. The digest is not known in here: who runs the image says IMAGE_DIGEST.
ARG GIT_REVISION=
LABEL org.opencontainers.image.revision="${GIT_REVISION}"
ENV GIT_REVISION=${GIT_REVISION}
USER 10001:10001
ENTRYPOINT ["agent-service"]
CMD ["api"]
