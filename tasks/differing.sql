-- What differs over the whole life of the suspects, by model and both ways; and in which state each is.
CREATE TEMP TABLE billed AS
SELECT account, run_id, known_as, sum(COLUMNS('.*_tokens')), max(occurred_at) AS last_at
FROM suspect_events
WHERE input_tokens + output_tokens <> 0 AND account IN (FROM compared_accounts)
GROUP BY ALL;

CREATE TEMP TABLE traced AS
SELECT
    account,
    run_id,
    known_as,
    sum(COLUMNS('.*_tokens')),
    any_value(name) AS name,
    count(*) AS calls,
    min(provider) AS provider,
    min(model) AS model,
    coalesce(
        min(started_at) FILTER (WHERE started_at >= getvariable('since') AND started_at < getvariable('until')),
        min(started_at)
    ) AS started_at,
    max(ended_at) AS ended_at
FROM counted
GROUP BY ALL;

-- Whatever is recorded of a run later changes these: see `metering.corrections`.
CREATE TEMP TABLE states AS
WITH e AS (
    SELECT run_id, count(*) AS events, max(seq) AS last_event
    FROM suspect_events
    GROUP BY run_id
),
s AS (
    SELECT r.run_id, count(*) AS spans, max(spans.seq) AS last_span
    FROM (SELECT DISTINCT run_id, trace_id FROM spans SEMI JOIN suspect_ids USING (run_id)) AS r
    JOIN spans USING (trace_id)
    GROUP BY r.run_id
)
SELECT
    run_id,
    concat_ws('/', coalesce(events, 0), coalesce(last_event, 0), coalesce(spans, 0), coalesce(last_span, 0)) AS state
FROM suspect_ids LEFT JOIN e USING (run_id) LEFT JOIN s USING (run_id);

-- Where either side names no model, a run is compared as a whole.
CREATE TEMP TABLE unnamed AS
SELECT account, run_id FROM billed WHERE known_as = 0
UNION
SELECT account, run_id FROM traced WHERE known_as = 0;

CREATE TEMP MACRO is_far(billed, traced) AS
    abs(billed - traced) > greatest(getvariable('tolerance_tokens'), getvariable('tolerance_percent') * traced / 100);

-- A part of which traces say nothing is not compared.
CREATE TEMP TABLE differing AS
WITH b AS (
    FROM (SELECT account, run_id, known_as, COLUMNS('.*_tokens') FROM billed) ANTI JOIN unnamed USING (account, run_id)
    UNION ALL
    SELECT account, run_id, 0, sum(COLUMNS('.*_tokens')) FROM billed SEMI JOIN unnamed USING (account, run_id) GROUP BY ALL
),
t AS (
    FROM (SELECT account, run_id, known_as, COLUMNS('.*_tokens') FROM traced) ANTI JOIN unnamed USING (account, run_id)
    UNION ALL
    SELECT account, run_id, 0, sum(COLUMNS('.*_tokens')) FROM traced SEMI JOIN unnamed USING (account, run_id) GROUP BY ALL
)
SELECT
    account,
    run_id,
    sum(
        abs(coalesce(b.input_tokens, 0) - coalesce(t.input_tokens, 0))
        + abs(coalesce(b.output_tokens, 0) - coalesce(t.output_tokens, 0))
    ) AS difference
FROM b FULL JOIN t USING (account, run_id, known_as)
GROUP BY ALL
HAVING bool_or(
    is_far(coalesce(b.input_tokens, 0), coalesce(t.input_tokens, 0))
    OR is_far(coalesce(b.output_tokens, 0), coalesce(t.output_tokens, 0))
    OR (t.cache_read_tokens > 0 AND is_far(coalesce(b.cache_read_tokens, 0), t.cache_read_tokens))
    OR (t.cache_write_tokens > 0 AND is_far(coalesce(b.cache_write_tokens, 0), t.cache_write_tokens))
    OR (t.cache_write_1h_tokens > 0 AND is_far(coalesce(b.cache_write_1h_tokens, 0), t.cache_write_1h_tokens))
    OR (t.input_audio_tokens > 0 AND is_far(coalesce(b.input_audio_tokens, 0), t.input_audio_tokens))
    OR (t.reasoning_tokens > 0 AND is_far(coalesce(b.reasoning_tokens, 0), t.reasoning_tokens))
    OR (t.output_audio_tokens > 0 AND is_far(coalesce(b.output_audio_tokens, 0), t.output_audio_tokens))
)
UNION ALL
SELECT DISTINCT account, run_id, 0 FROM held_only
SEMI JOIN suspect_ids USING (run_id)
ANTI JOIN billed USING (account, run_id)
ANTI JOIN traced USING (account, run_id);

CREATE TEMP TABLE pending AS
SELECT account, run_id FROM differing SEMI JOIN (
    SELECT account, run_id FROM billed WHERE last_at >= getvariable('quiet_since')
    UNION ALL
    SELECT account, run_id FROM traced WHERE ended_at >= getvariable('quiet_since')
    UNION ALL
    SELECT account, run_id FROM held_runs WHERE is_open OR held_at >= getvariable('quiet_since')
) USING (account, run_id);

CREATE TEMP TABLE accepted_runs AS
SELECT account, run_id FROM differing JOIN states USING (run_id)
SEMI JOIN accepted USING (account, run_id, state)
ANTI JOIN pending USING (account, run_id);

CREATE TEMP TABLE judged AS
SELECT account, run_id, state FROM differing JOIN states USING (run_id)
ANTI JOIN pending USING (account, run_id)
ANTI JOIN accepted_runs USING (account, run_id)
ORDER BY difference DESC, account, run_id
LIMIT (getvariable('most_judged'));
