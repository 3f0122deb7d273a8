#!/usr/bin/env bash
# Brings an image to staging or production without giving it any work: migrates, then makes a revision of the API that
# answers at an address of its own, and one of the workers that has no instances. A first deployment gets all of both.
#
#     deploy.sh staging|production REGISTRY/agent-service@sha256:…
#
# Prints to standard output what `promote.sh` goes on with. Exit code 0: all of that is there; 1: something failed, and
# what served before serves on; 2: refused, and nothing was changed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

verify_signature() {
    local said
    if [[ -n ${COSIGN_KEY:-} ]]; then
        said=$(cosign verify --key "$COSIGN_KEY" "$IMAGE" 2>&1 >/dev/null) && return
    elif [[ -n ${COSIGN_IDENTITY:-} && -n ${COSIGN_ISSUER:-} ]]; then
        said=$(cosign verify --certificate-identity-regexp "$COSIGN_IDENTITY" \
            --certificate-oidc-issuer "$COSIGN_ISSUER" "$IMAGE" 2>&1 >/dev/null) && return
    else
        refuse "COSIGN_KEY, or COSIGN_IDENTITY and COSIGN_ISSUER, must say whose signature an image needs"
    fi
    refuse "$IMAGE is not signed as it must be: $said"
}

main() {
    [[ $# == 2 ]] || refuse "usage: deploy.sh staging|production REGISTRY/agent-service@sha256:…"
    read_image "$2"
    read_environment "$1"
    say "verifying the signature of $digest"
    verify_signature

    # Never from a failed question: without an answer, nobody knows whether this is the first deployment.
    local serving_api serving_worker
    serving_api=$(running api revision)
    serving_worker=$(running worker revision)

    # A name of its own for every deployment: the same image may come back with other settings.
    local suffix
    suffix=${digest:7:8}-$(date -u +%Y%m%d%H%M%S)
    # Everything is filled in before anything is changed.
    rendered=$(mktemp -d)
    trap 'rm -rf "$rendered"' EXIT
    render migrate-job
    CANDIDATE=$API-$suffix SERVING=${serving_api:-$API-$suffix} render service
    render_workers

    say "migrating"
    cloud run jobs replace "$rendered/migrate-job.yaml" --region="$REGION" >&2
    # Not undone by a rollback: every migration works with the release before it.
    cloud run jobs execute agent-service-migrate --region="$REGION" --wait >&2

    say "starting $API-$suffix, without traffic${serving_api:+ beside $serving_api}"
    cloud run services replace "$rendered/service.yaml" --region="$REGION" >&2
    say "making $WORKER-$suffix${serving_worker:+, without instances beside $serving_worker}"
    render_workers # again: CREMA may have changed their number meanwhile
    cloud beta run worker-pools replace "$rendered/worker-pool.yaml" >&2

    local candidate_url url
    candidate_url=$(running api candidate)
    url=$(running api url)
    printf '%s\n' "candidate_api=$API-$suffix" "candidate_worker=$WORKER-$suffix" "serving_api=$serving_api" \
        "serving_worker=$serving_worker" "candidate_url=$candidate_url" "url=$url"
}

render_workers() {
    local instances
    instances=$(running worker instances)
    CANDIDATE=$WORKER-$suffix SERVING=${serving_worker:-$WORKER-$suffix} WORKER_INSTANCES=$instances render worker-pool
}

render() { python3 "$here/render.py" "$here/$1.yaml" >"$rendered/$1.yaml"; }

main "$@"
