-- What `reconcile.sql` is told; known_as is 0 where no model is named.
CREATE TEMP TABLE model_names (model VARCHAR, name VARCHAR, known_as SMALLINT);
CREATE TEMP TABLE held_runs (account VARCHAR, run_id VARCHAR, is_open BOOLEAN, held_at TIMESTAMPTZ);
CREATE TEMP TABLE periods (account VARCHAR, period_start TIMESTAMPTZ, period_end TIMESTAMPTZ);
CREATE TEMP TABLE asked (account VARCHAR);
