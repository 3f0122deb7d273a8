#!/usr/bin/env bash
# Starts CREMA for the worker pool, or gives it another configuration. To be run once, and after a change of crema.yaml,
# crema-service.yaml or the version of the scaling key.
#
#     scaler.sh staging|production
#
# Exit code 0: it runs with this configuration; 1: something failed; 2: refused, and nothing was changed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
PARAMETER=agent-service-crema

main() {
    [[ $# == 1 ]] || refuse "usage: scaler.sh staging|production"
    read_environment "$1"
    rendered=$(mktemp -d)
    trap 'rm -rf "$rendered"' EXIT
    API_URL=$(running api url)
    export API_URL
    python3 "$here/render.py" "$here/crema.yaml" >"$rendered/crema.yaml"
    # Versions cannot be changed: each is named after what it says.
    local sum
    sum=$(sha256sum <"$rendered/crema.yaml")
    export CREMA_VERSION=c-${sum:0:12}
    python3 "$here/render.py" "$here/crema-service.yaml" >"$rendered/crema-service.yaml"

    local names
    names=$(cloud parametermanager parameters versions list --parameter="$PARAMETER" --location=global --format="value(name)")
    if [[ $names != *"/$CREMA_VERSION"* ]]; then
        say "storing the configuration as $CREMA_VERSION"
        cloud parametermanager parameters versions create "$CREMA_VERSION" --parameter="$PARAMETER" --location=global \
            --payload-data-from-file="$rendered/crema.yaml" >&2
    fi
    say "starting CREMA with $CREMA_VERSION"
    cloud run services replace "$rendered/crema-service.yaml" --region="$REGION" >&2
}

main "$@"
