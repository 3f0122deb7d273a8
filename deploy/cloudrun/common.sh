# What the scripts of this folder share; they read it with `source`.
# shellcheck shell=bash

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
API=agent-service-api
WORKER=agent-service-worker

say() { printf '== %s\n' "$*" >&2; }

refuse() { # a reason; nothing has been changed
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# Reads ENVIRONMENT.env. What the environment sets already stays.
read_environment() {
    local name value
    [[ $1 == staging || $1 == production ]] || refuse "$1 is neither staging nor production"
    while IFS='=' read -r name value; do
        if [[ $name =~ ^[A-Z][A-Z0-9_]*$ && -z ${!name:-} ]]; then
            export "$name=$value"
        fi
    done <"$here/$1.env"
    export ENVIRONMENT=$1
    for name in PROJECT_ID REGION; do
        [[ -n ${!name:-} ]] || refuse "$name is not set: in $1.env, or in the environment"
    done
}

# Takes an image by digest alone: a tag may name another one tomorrow.
read_image() {
    [[ $1 =~ ^[a-z0-9][a-z0-9._:/-]*@sha256:[0-9a-f]{64}$ ]] ||
        refuse "$1 does not name an image by its digest (…@sha256:…)"
    export IMAGE=$1
    # shellcheck disable=SC2034 # for the scripts
    digest=${1##*@}
}

# `gcloud` in this project. Worker pools are among the beta commands of older releases; those of newer ones have them, too.
cloud() { gcloud "$@" --project="$PROJECT_ID" --quiet; }

running() { # api|worker, and what is asked of running.py
    if [[ $1 == api ]]; then
        cloud run services list --region="$REGION" --format=json | python3 "$here/running.py" "$API" "$2"
    else
        cloud beta run worker-pools list --region="$REGION" --format=json | python3 "$here/running.py" "$WORKER" "$2"
    fi
}
