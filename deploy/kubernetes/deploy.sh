#!/usr/bin/env bash
# Brings an image, by its digest, to an environment: secrets and networks, migration, rollout. Goes back on failure.
#
#   deploy/kubernetes/deploy.sh staging IMAGE@sha256:…            to the cluster that kubectl speaks to
#   deploy/kubernetes/deploy.sh --print staging IMAGE@sha256:…    only prints what it would apply
set -euo pipefail

usage() {
    echo "usage: deploy.sh [--print] staging|production IMAGE@sha256:DIGEST" >&2
    exit 2
}

mode=apply
if [[ ${1:-} == --print ]]; then
    mode=print
    shift
fi
[[ $# -eq 2 ]] || usage
environment=$1 image=$2
[[ $environment =~ ^(staging|production)$ ]] || usage
if [[ ! $image =~ ^[a-z0-9][a-z0-9.:/_-]*@sha256:[0-9a-f]{64}$ ]]; then
    echo "deploy.sh: $image is not an image by its digest, as in registry.example.com/agent-service@sha256:…" >&2
    exit 2
fi

here=$(cd "$(dirname "$0")" && pwd)
namespace=agent-service-$environment
nobody=$(printf '0%.0s' {1..64})
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$here/../../.ci/kustomize" "$here/overlays/$environment" >"$work/placeholder.yaml"
sed -e "s|registry\.example\.com/agent-service@sha256:$nobody|$image|" -e "s|sha256:$nobody|${image#*@}|" \
    "$work/placeholder.yaml" >"$work/all.yaml"
if grep -q "$nobody" "$work/all.yaml"; then
    echo "deploy.sh: an image of $environment has not got its digest" >&2
    exit 1
fi
if [[ $mode == print ]]; then
    cat "$work/all.yaml"
    exit
fi

in_namespace() { kubectl --namespace "$namespace" "$@"; }
role=app.kubernetes.io/name

echo "== what the rest needs: namespace, secrets, networks"
kubectl apply --filename "$work/all.yaml" --selector "$role notin (api, worker, migrate)"
# Not `scaling`: its key comes out of the service itself, after the first deployment.
in_namespace wait --for=condition=Ready externalsecret/shared externalsecret/worker externalsecret/migrate --timeout=120s

echo "== migration"
in_namespace delete job migrate --ignore-not-found --wait
kubectl apply --filename "$work/all.yaml" --selector "$role=migrate"
for ((seconds = 0; ; seconds += 2)); do
    ended=$(in_namespace get job migrate --output 'jsonpath={.status.conditions[?(@.status=="True")].type}')
    [[ $ended == *Complete* ]] && break
    if [[ $ended == *Failed* || $seconds -ge 900 ]]; then
        in_namespace logs job/migrate --tail 50 >&2 || true
        echo "deploy.sh: the migration failed; what runs was not touched" >&2
        exit 1
    fi
    sleep 2
done

echo "== rollout"
kubectl apply --filename "$work/all.yaml" --selector "$role in (api, worker)"
for deployment in api worker; do
    if ! in_namespace rollout status "deployment/$deployment" --timeout=600s; then
        echo "deploy.sh: $deployment did not become ready: going back to the release before" >&2
        in_namespace rollout undo deployment/api deployment/worker || true
        exit 1
    fi
done
echo "== $environment runs $image"
