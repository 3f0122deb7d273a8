#!/usr/bin/env bash
# Brings an image, by its digest, to an environment on Azure Container Apps: migration, then workers and API. A revision
# that does not become ready gets no traffic: the one before it goes on.
#
#   deploy/container-apps/deploy.sh staging REGISTRY/agent-service@sha256:…
#   deploy/container-apps/deploy.sh --print worker staging REGISTRY/agent-service@sha256:…    only prints a manifest
set -euo pipefail

usage() {
    echo "usage: deploy.sh [--print api|worker|migrate] staging|production IMAGE@sha256:DIGEST" >&2
    exit 2
}

only=
if [[ ${1:-} == --print ]]; then
    only=${2:-}
    [[ $only =~ ^(api|worker|migrate)$ ]] || usage
    shift 2
fi
[[ $# -eq 2 && $1 =~ ^(staging|production)$ ]] || usage
environment=$1 image=$2
if [[ ! $image =~ ^[a-z0-9][a-z0-9.:/_-]*@sha256:[0-9a-f]{64}$ ]]; then
    echo "deploy.sh: $image is not an image by its digest, as in registry.example.com/agent-service@sha256:…" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)

manifest() {
    python3 - "$here/$1.yaml" "$here/$environment.env" "$environment" "$image" <<'PYTHON'
import pathlib, string, sys

manifest, values, environment, image = sys.argv[1:]
lines = pathlib.Path(values).read_text().splitlines()
known = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
registry, digest = image.partition("/")[0], image.partition("@")[2]
known |= {"ENVIRONMENT": environment, "IMAGE": image, "IMAGE_DIGEST": digest, "REGISTRY": registry}
text = "".join(line for line in pathlib.Path(manifest).open() if not line.startswith("#"))
try:
    print(string.Template(text).substitute(known), end="")
except KeyError as error:
    sys.exit(f"deploy.sh: {error.args[0]} is missing in {values}")
PYTHON
}

if [[ -n $only ]]; then
    manifest "$only"
    exit
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
group=$(sed -n 's/^RESOURCE_GROUP=//p' "$here/$environment.env")

put() { # "containerapp" or "containerapp job", and the name
    local verb=create
    manifest "$2" >"$work/$2.yaml"
    # shellcheck disable=SC2086 # two words
    az $1 show --name "$2" --resource-group "$group" --output none 2>/dev/null && verb=update
    # shellcheck disable=SC2086
    az $1 $verb --name "$2" --resource-group "$group" --yaml "$work/$2.yaml" --output none
}

echo "== migration"
put "containerapp job" migrate
execution=$(az containerapp job start --name migrate --resource-group "$group" --query name --output tsv)
for ((seconds = 0; ; seconds += 5)); do
    status=$(az containerapp job execution show --name migrate --resource-group "$group" \
        --job-execution-name "$execution" --query properties.status --output tsv)
    [[ $status == Succeeded ]] && break
    if [[ $status =~ ^(Failed|Stopped|Degraded)$ || $seconds -ge 900 ]]; then
        echo "deploy.sh: the migration is $status; what runs was not touched" >&2
        exit 1
    fi
    sleep 5
done

for app in api worker; do
    echo "== $app"
    put containerapp $app
done
echo "== $environment is told to run $image: the smoke test says when it does"
