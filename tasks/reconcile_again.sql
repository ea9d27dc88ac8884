-- The runs that may differ, over their whole life: a conversation may be longer than a period. `counted_spans.sql` is to
-- be run after this, and `differing.sql`.
CREATE TEMP TABLE suspect_ids AS
SELECT DISTINCT run_id FROM runs WHERE run_id IS NOT NULL;

CREATE TEMP TABLE suspect_events AS
FROM model_events SEMI JOIN suspect_ids USING (run_id);

DROP VIEW looked_at;

CREATE TEMP TABLE looked_at AS
FROM known_spans SEMI JOIN suspect_ids USING (run_id);

CREATE OR REPLACE TEMP VIEW with_tokens AS FROM looked_at;

SET VARIABLE near_since = TIMESTAMPTZ '-infinity';
SET VARIABLE near_until = TIMESTAMPTZ 'infinity';
