-- The runs that may differ, over their whole life: a conversation may be longer than a period. `counted_spans.sql` is to
-- be run after this, and `differing.sql`.
CREATE TEMP TABLE suspects AS
SELECT account, run_id FROM runs WHERE run_id IS NOT NULL;

DROP VIEW looked_at;

CREATE TEMP TABLE looked_at AS
FROM known_spans SEMI JOIN suspects USING (run_id);
