#!/usr/bin/env bash
# Makes those secrets of an environment that can be made, one file each; what is there already stays.
#
#   deploy/compose/make-secrets.sh /etc/agent-service/staging
set -euo pipefail

if [[ $# -ne 1 || $1 == -* ]]; then
    echo "usage: deploy/compose/make-secrets.sh FOLDER" >&2
    exit 2
fi
folder=$1/secrets
# Nobody else may enter the folder. In it everybody may read, because containers have users of their own.
mkdir -p "$folder"
chmod 700 "$folder"

keep() { # keep NAME: what is read becomes the secret of this name
    [[ -s $folder/$1 ]] || { cat >"$folder/$1.new" && chmod 644 "$folder/$1.new" && mv "$folder/$1.new" "$folder/$1"; }
}

openssl rand -hex 24 | keep postgres_password
openssl rand -hex 24 | keep service_password
at=postgres:5432/agent_service
printf 'postgresql://postgres:%s@%s\n' "$(<"$folder/postgres_password")" "$at" | keep owner_database_url
printf 'postgresql://service:%s@%s\n' "$(<"$folder/service_password")" "$at" | keep database_url
openssl rand -base64 32 | keep webhook_signing_key
openssl genpkey -algorithm ed25519 | keep audit_signing_key
[[ -s $folder/openai_api_key ]] || echo "Still to be made: $folder/openai_api_key (chmod 644)"
