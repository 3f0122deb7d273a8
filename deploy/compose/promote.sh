#!/usr/bin/env bash
# Brings an image to staging or production on this machine, by its digest; where it does not pass, what ran before runs on.
#
#   deploy/compose/promote.sh registry.example.com/agent-service@sha256:… staging
#   deploy/compose/promote.sh registry.example.com/agent-service@sha256:… production
#
# Its signature is verified. A candidate, a whole service of its own beside the other with an empty database, has to pass
# the smoke test. Then the database is migrated, API and workers are replaced, and the smoke test is made again. Production
# takes what staging runs, or what it has run before. Exit code 0: it runs; 1: it does not; 2: wrong usage.
#
# CONFIG                  folder of both environments (/etc/agent-service): README.md says what is in it
# PROJECT                 how its projects' names begin (agent-service), where several services share a machine
# COSIGN_PUBLIC_KEY       who has to have signed; or COSIGN_IDENTITY and COSIGN_ISSUER, for signatures without a key
# COSIGN_WITHOUT_LOG=1    do not ask the public log of signatures, where it cannot be reached or is not used
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { echo "promote: $*"; }
fail() { echo "promote: $*" >&2; exit 1; }
misused() {
    echo "promote: $*" >&2
    echo "usage: deploy/compose/promote.sh REGISTRY/NAME@sha256:DIGEST staging|production" >&2
    exit 2
}

[[ $# -eq 2 ]] || misused "an image and an environment are needed"
image=$1
environment=$2
[[ $environment == staging || $environment == production ]] || misused "there is no environment '$environment'"
[[ $image =~ ^[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9._-]+)+@sha256:[0-9a-f]{64}$ ]] ||
    misused "'$image' is refused: name the image by its digest alone, because a tag may be another image tomorrow"

export CONFIG=${CONFIG:-/etc/agent-service}
home=$CONFIG/$environment
[[ -d $home/secrets ]] || misused "there is no folder $home/secrets (see deploy/compose/README.md)"
# A candidate on the service's own database would take its runs.
grep -q '@postgres:5432/' "$home/secrets/database_url" ||
    misused "$home/secrets/database_url must be of the service's own Postgres: …@postgres:5432/agent_service"

signer=()
if [[ -n ${COSIGN_PUBLIC_KEY:-} ]]; then
    [[ -r $COSIGN_PUBLIC_KEY ]] || misused "COSIGN_PUBLIC_KEY: $COSIGN_PUBLIC_KEY cannot be read"
    signer=(--key "$COSIGN_PUBLIC_KEY")
elif [[ -n ${COSIGN_IDENTITY:-} && -n ${COSIGN_ISSUER:-} ]]; then
    signer=(--certificate-identity "$COSIGN_IDENTITY" --certificate-oidc-issuer "$COSIGN_ISSUER")
else
    misused "who has to have signed the image? Set COSIGN_PUBLIC_KEY, or COSIGN_IDENTITY and COSIGN_ISSUER"
fi
[[ ${COSIGN_WITHOUT_LOG:-} != 1 ]] || signer+=(--insecure-ignore-tlog=true)
for program in cosign docker flock python3; do
    command -v "$program" >/dev/null || misused "$program is not installed"
done

project=${PROJECT:-agent-service}-$environment
passed=$home/passed # every image that passed here, a line each; the last one is what runs
settings=$home/settings.env
[[ -r $settings ]] || settings=/dev/null
files=(--file docker-compose.yml --file "deploy/compose/$environment.yml")
[[ ! -r $home/compose.yml ]] || files+=(--file "$home/compose.yml")
before=
[[ ! -s $passed ]] || before=$(tail -n 1 "$passed")

compose() { # compose PROJECT IMAGE ARGUMENTS…
    IMAGE=$2 IMAGE_DIGEST=${2#*@} docker compose --progress quiet --env-file "$settings" --project-name "$1" "${files[@]}" "${@:3}"
}

start() { # start PROJECT IMAGE: what migrates is not started again, because an older image could not
    compose "$1" "$2" up --detach --no-build --no-deps --wait --wait-timeout 120 api worker
}

migrate() { # migrate PROJECT IMAGE
    compose "$1" "$2" up --detach --wait --wait-timeout 120 postgres redis &&
        compose "$1" "$2" run --rm --no-deps --no-TTY migrate
}

smoke() { # smoke PROJECT IMAGE
    local key url
    key=$(compose "$1" "$2" exec --no-TTY api agent-service keys create --tenant smoke --name "${2#*@}" \
        --scope runs:read --scope runs:write --scope audit:read --expires-in 1h 2>/dev/null) || return 1
    url=http://$(compose "$1" "$2" port api 8000) || return 1
    AGENT_SERVICE_KEY=$key python3 deploy/smoke.py "$url" --digest "${2#*@}" --environment "$environment" --worker-too
}

try() { # try PROJECT IMAGE: what its processes said last, where it does not pass
    # In a trap a bare `return` would give the code that the trap was entered with.
    start "$1" "$2" && smoke "$1" "$2" && return 0
    compose "$1" "$2" logs --no-color --tail 10 api worker >&2
    return 1
}

candidate() { # Of the service it has all but the data, the port, and what others read of its audit.
    API_PORT=0 WORKERS=1 AUDIT_ANCHOR=audit-checkpoints.jsonl "$1" "$project-candidate" "$image" "${@:2}"
}

go_back() {
    # A replacement that was interrupted leaves containers under each other's names.
    compose "$project" "$image" rm --stop --force api worker
    if [[ -z $before ]]; then
        say "nothing ran in $environment before, and nothing runs now"
    elif try "$project" "$before"; then
        say "back in $environment: $before"
    else
        say "$before COULD NOT BE BROUGHT BACK in $environment: look at it now" >&2
    fi
}

undo=()
end() {
    local code=$?
    trap - EXIT
    trap '' INT TERM HUP PIPE
    set +e
    [[ $code -eq 0 ]] || echo "promote: it does NOT run in $environment: $image" >&2
    "${undo[@]}"
    exit "$code"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

exec 9>"$CONFIG/lock"
flock --nonblock 9 || fail "another promotion is under way on this machine"

if [[ $environment == production ]]; then
    [[ -s $CONFIG/staging/passed && $(tail -n 1 "$CONFIG/staging/passed") == "$image" ]] ||
        grep -qxF "$image" "$passed" 2>/dev/null ||
        fail "staging does not run $image: promote it there first"
fi
cosign verify "${signer[@]}" "$image" >/dev/null || fail "refused: the signature of $image does not hold"
say "signed: $image"
docker pull --quiet "$image" >/dev/null || fail "$image cannot be pulled"

say "a candidate is started beside $environment"
undo=(candidate compose down --volumes --remove-orphans --timeout 10)
candidate migrate || fail "the candidate's database could not be migrated"
candidate try || fail "the candidate did not pass"
"${undo[@]}"
undo=()

say "the database of $environment is migrated"
migrate "$project" "$image" || fail "the database could not be migrated"

say "API and workers of $environment are replaced"
undo=(go_back)
try "$project" "$image" || fail "it did not pass in $environment"
echo "$image" >>"$passed"
undo=()
say "runs in $environment: $image"
