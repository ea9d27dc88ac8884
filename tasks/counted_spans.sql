-- Which of the spans with tokens in `looked_at` count (all but `repeats`), and whose they are. Children are looked for
-- between near_since and near_until.

-- A span that says what spans below it say repeats them: the rule of `metering.traces.sum_trace_tokens`. It is looked at
-- from above, because few spans with tokens have anything below them.
CREATE OR REPLACE TEMP TABLE tops AS
SELECT trace_id, span_id, seq FROM with_tokens
SEMI JOIN (
    SELECT trace_id, parent_span_id AS span_id FROM spans
    WHERE parent_span_id IS NOT NULL AND started_at >= getvariable('near_since') AND started_at < getvariable('near_until')
) USING (trace_id, span_id);

CREATE OR REPLACE TEMP TABLE links AS
SELECT trace_id, parent_span_id, span_id, input_tokens + output_tokens > 0 AS has_tokens
FROM spans SEMI JOIN tops USING (trace_id)
WHERE parent_span_id IS NOT NULL;

-- Links that no root is above lie in a ring, or below one. Spans in a ring are not above each other.
CREATE OR REPLACE TEMP TABLE unrooted AS
WITH RECURSIVE rooted AS (
    SELECT trace_id, span_id FROM links
    ANTI JOIN (SELECT trace_id, span_id AS parent_span_id FROM links) USING (trace_id, parent_span_id)
    UNION ALL
    SELECT links.trace_id, links.span_id
    FROM rooted JOIN links ON links.trace_id = rooted.trace_id AND links.parent_span_id = rooted.span_id
)
SELECT trace_id, parent_span_id, span_id FROM links ANTI JOIN rooted USING (trace_id, span_id);

CREATE OR REPLACE TEMP TABLE rings AS
WITH RECURSIVE above AS (
    SELECT trace_id, span_id, parent_span_id FROM unrooted
    UNION
    SELECT above.trace_id, above.span_id, unrooted.parent_span_id
    FROM above JOIN unrooted ON unrooted.trace_id = above.trace_id AND unrooted.span_id = above.parent_span_id
)
SELECT trace_id, span_id FROM above WHERE span_id = parent_span_id;

CREATE OR REPLACE TEMP TABLE repeats AS
WITH RECURSIVE tree AS (
    FROM links ANTI JOIN rings USING (trace_id, span_id)
),
below AS (
    SELECT trace_id, parent_span_id AS top, span_id, has_tokens
    FROM tree SEMI JOIN tops ON tops.trace_id = tree.trace_id AND tops.span_id = tree.parent_span_id
    UNION
    SELECT below.trace_id, below.top, tree.span_id, tree.has_tokens
    FROM below JOIN tree ON tree.trace_id = below.trace_id AND tree.parent_span_id = below.span_id
    WHERE NOT below.has_tokens
)
SELECT seq FROM tops
SEMI JOIN (SELECT trace_id, top AS span_id FROM below WHERE has_tokens) USING (trace_id, span_id);

-- Whose a run is, where some of its spans do not say.
CREATE OR REPLACE TEMP TABLE unowned AS
SELECT DISTINCT run_id FROM looked_at WHERE account IS NULL;

CREATE OR REPLACE TEMP TABLE owners AS
WITH said AS (
    SELECT run_id, account FROM usage_events SEMI JOIN unowned USING (run_id)
    UNION ALL
    SELECT run_id, account FROM looked_at SEMI JOIN unowned USING (run_id) WHERE account IS NOT NULL
    UNION ALL
    SELECT run_id, account FROM held_runs SEMI JOIN unowned USING (run_id)
)
SELECT run_id, min(account) AS owner FROM said GROUP BY run_id HAVING min(account) = max(account);
