#!/bin/sh
# Run by PostgreSQL's image when its data folder is made: a database for ledgers, and the user that owns it.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
\getenv password LEDGER_PASSWORD
CREATE ROLE sweeps LOGIN PASSWORD :'password';
CREATE DATABASE ledgers OWNER sweeps ENCODING 'UTF8' TEMPLATE template0;
SQL
