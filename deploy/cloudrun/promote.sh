#!/usr/bin/env bash
# Brings an image into service, step by step, and goes back to what served before when a step fails or is interrupted:
# deploy.sh, a smoke test where no traffic goes, then 10, 50 and 100 % of traffic and workers, each with a smoke test and
# a look at the share of requests that fail.
#
#     AGENT_SERVICE_KEY=… promote.sh staging|production REGISTRY/agent-service@sha256:…
#
# Production takes only the digest that staging runs. Exit code 0: it is in service; 1: it is not, and what served before
# serves all; 2: refused, and nothing was changed; 130, 143: interrupted, then as 1.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

candidate_api='' candidate_worker='' serving_api='' serving_worker='' candidate_url='' url=''
waiting='' has_moved='' is_done=''

main() {
    [[ $# == 2 ]] || refuse "usage: promote.sh staging|production REGISTRY/agent-service@sha256:…"
    read_image "$2"
    read_environment "$1"
    [[ -n ${AGENT_SERVICE_KEY:-} ]] || refuse "AGENT_SERVICE_KEY is not set: the smoke test submits a run with it"
    [[ $1 != production ]] || must_run_in_staging

    local facts name value
    facts=$(AGENT_SERVICE_KEY='' "$here/deploy.sh" "$1" "$IMAGE")
    while IFS='=' read -r name value; do
        printf -v "$name" '%s' "$value"
    done <<<"$facts"

    trap 'interrupted 130' INT
    trap 'interrupted 143' TERM HUP
    trap finish EXIT
    smoke "$candidate_url"
    local share shares='10 50 100'
    # The first deployment has all from the beginning.
    [[ -n $serving_api ]] || shares=100
    for share in $shares; do
        say "giving $share % to $digest"
        move "$share"
        smoke "$candidate_url"
        gate
    done
    smoke "$url"
    is_done=1
    say "$ENVIRONMENT runs $digest"
}

must_run_in_staging() {
    [[ -n ${STAGING_URL:-} ]] || refuse "STAGING_URL is not set: production takes only what staging runs"
    python3 - "$STAGING_URL/version" "$digest" <<'PYTHON' || refuse "promote $digest to staging first"
import json, sys
from urllib.request import urlopen

url, digest = sys.argv[1:]
try:
    with urlopen(url, timeout=10) as answer:
        runs = json.load(answer)
except (OSError, ValueError) as error:
    sys.exit(f"staging does not say what it runs: {error}")
if (runs.get("image_digest"), runs.get("environment")) != (digest, "staging"):
    sys.exit(f"{url} shows {runs.get('image_digest') or 'no digest'} in {runs.get('environment')}")
PYTHON
}

# Gives the candidates a share in percent of the traffic and of the workers' instances; where nothing served before, all.
move() {
    has_moved=1
    cloud run services update-traffic "$API" --region="$REGION" \
        --to-revisions="$(split "$candidate_api" "$serving_api" "$1")" >&2
    cloud beta run worker-pools update-instance-split "$WORKER" --region="$REGION" \
        --to-revisions="$(split "$candidate_worker" "$serving_worker" "$1")" >&2
}

split() {
    if [[ -z $2 || $3 == 100 ]]; then
        printf '%s=100' "$1"
    else
        printf '%s=%s,%s=%s' "$1" "$3" "$2" "$((100 - $3))"
    fi
}

smoke() {
    say "smoke test of $1"
    patiently python3 "$here/../smoke.py" "$1" --digest "$digest" --environment "$ENVIRONMENT" \
        --seconds "${SMOKE_SECONDS:-60}"
}

gate() {
    say "looking at $candidate_api for ${GATE_SECONDS:=300} s"
    local token
    token=$(cloud auth print-access-token)
    TOKEN=$token patiently python3 "$here/gate.py" --project "$PROJECT_ID" --service "$API" \
        --revision "$candidate_api" --seconds "$GATE_SECONDS" --max-share "${GATE_MAX_SHARE:-0.01}" \
        --min-requests "${GATE_MIN_REQUESTS:-20}" ${MONITORING_URL:+--monitoring "$MONITORING_URL"}
}

# Runs what takes minutes in such a way that a signal interrupts it: bash looks at signals only between commands.
patiently() {
    "$@" >&2 &
    waiting=$!
    wait "$waiting"
    waiting=''
}

interrupted() {
    say "interrupted"
    [[ -z $waiting ]] || kill "$waiting" 2>/dev/null || true
    exit "$1"
}

finish() {
    local status=$?
    [[ -z $is_done ]] || exit 0
    # From here on nothing interrupts: whoever loses patience would leave the traffic split.
    trap '' INT TERM HUP
    go_back
    [[ $status == 130 || $status == 143 ]] || status=1
    exit "$status"
}

go_back() {
    if [[ -z $serving_api ]]; then
        say "FAILED: $digest is the first deployment, there is nothing to go back to"
        return
    fi
    if [[ -z $has_moved ]]; then
        say "FAILED: $digest has had no traffic, $serving_api serves on"
        return
    fi
    say "FAILED: going back to $serving_api"
    local is_back=1
    cloud run services update-traffic "$API" --region="$REGION" --to-revisions="$serving_api=100" >&2 || is_back=''
    if [[ -n $serving_worker ]]; then
        cloud beta run worker-pools update-instance-split "$WORKER" --region="$REGION" \
            --to-revisions="$serving_worker=100" >&2 || is_back=''
    fi
    if [[ -n $is_back ]]; then
        say "back: $serving_api serves all"
    else
        say "NOT BACK: give all to $serving_api and $serving_worker by hand, the README says how"
    fi
}

main "$@"
