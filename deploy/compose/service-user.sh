#!/bin/sh
# Run once by the Postgres image, when it makes the database: the user that the API and the workers log in as. `migrate`
# gives it its rights.
set -eu
[ -z "${SERVICE_PASSWORD_FILE:-}" ] || SERVICE_PASSWORD=$(cat "$SERVICE_PASSWORD_FILE")
psql --quiet --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname "$POSTGRES_DB" \
    --set password="$SERVICE_PASSWORD" <<'SQL'
CREATE ROLE service LOGIN PASSWORD :'password';
SQL
