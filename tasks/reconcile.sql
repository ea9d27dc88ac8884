-- Which runs of a billing period differ between what was billed and what was traced. Told by `reconcile_tables.sql` and
-- by variables: period, the labels and times around it (earliest_period .. latest_period, since .. until), month_start,
-- month_end, quiet_since, tolerance_tokens, tolerance_percent, most_judged. Left are `runs`, `differing`, and the tables of
-- what differs. An account that is not known is ''.

-- A signal without a model counts a text, and is no call of a model; nor is what corrects it.
CREATE TEMP VIEW model_events AS
SELECT usage_events.*, name, coalesce(known_as, 0) AS known_as
FROM usage_events LEFT JOIN model_names USING (model)
WHERE run_id IS NOT NULL AND model IS NOT NULL
UNION ALL
SELECT *, NULL, 0
FROM usage_events
WHERE run_id IS NOT NULL
    AND model IS NULL
    AND kind <> 'signal'
    AND (corrects IS NULL OR corrects NOT IN (SELECT event_id FROM usage_events WHERE kind = 'signal'));

-- Reversals are part of the sums.
CREATE TEMP VIEW run_events AS
FROM model_events
WHERE period >= getvariable('earliest_period') AND period <= getvariable('latest_period')
    AND input_tokens + output_tokens <> 0;

CREATE TEMP VIEW used_spans AS
FROM spans
WHERE started_at >= getvariable('since') AND started_at < getvariable('until') AND input_tokens + output_tokens > 0;

-- A span that says what spans below it say repeats them: the rule of `metering.traces.sum_trace_tokens`. It is looked at
-- from above, because few spans with tokens have anything below them.
CREATE TEMP TABLE tops AS
SELECT trace_id, span_id, seq FROM used_spans
SEMI JOIN (SELECT trace_id, parent_span_id AS span_id FROM spans WHERE parent_span_id IS NOT NULL)
USING (trace_id, span_id);

CREATE TEMP TABLE links AS
SELECT trace_id, parent_span_id, span_id, input_tokens + output_tokens > 0 AS has_tokens
FROM spans SEMI JOIN tops USING (trace_id)
WHERE parent_span_id IS NOT NULL;

-- Links that no root is above lie in a ring, or below one. Spans in a ring are not above each other.
CREATE TEMP TABLE unrooted AS
WITH RECURSIVE rooted AS (
    SELECT trace_id, span_id FROM links
    ANTI JOIN (SELECT trace_id, span_id AS parent_span_id FROM links) USING (trace_id, parent_span_id)
    UNION ALL
    SELECT links.trace_id, links.span_id
    FROM rooted JOIN links ON links.trace_id = rooted.trace_id AND links.parent_span_id = rooted.span_id
)
SELECT trace_id, parent_span_id, span_id FROM links ANTI JOIN rooted USING (trace_id, span_id);

CREATE TEMP TABLE rings AS
WITH RECURSIVE above AS (
    SELECT trace_id, span_id, parent_span_id FROM unrooted
    UNION
    SELECT above.trace_id, above.span_id, unrooted.parent_span_id
    FROM above JOIN unrooted ON unrooted.trace_id = above.trace_id AND unrooted.span_id = above.parent_span_id
)
SELECT trace_id, span_id FROM above WHERE span_id = parent_span_id;

CREATE TEMP TABLE repeats AS
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
CREATE TEMP TABLE owners AS
WITH unowned AS (
    SELECT DISTINCT run_id FROM used_spans WHERE account IS NULL
),
said AS (
    SELECT run_id, account FROM usage_events SEMI JOIN unowned USING (run_id)
    UNION ALL
    SELECT run_id, account FROM used_spans SEMI JOIN unowned USING (run_id) WHERE account IS NOT NULL
    UNION ALL
    SELECT run_id, account FROM held_runs SEMI JOIN unowned USING (run_id)
)
SELECT run_id, min(account) AS owner FROM said GROUP BY run_id HAVING min(account) = max(account);

CREATE TEMP VIEW counted_spans AS
SELECT
    used_spans.* EXCLUDE (account), coalesce(account, owner, '') AS account, name, coalesce(known_as, 0) AS known_as
FROM used_spans
ANTI JOIN repeats USING (seq)
LEFT JOIN owners USING (run_id)
LEFT JOIN model_names USING (model);

CREATE TEMP TABLE compared_accounts AS
SELECT DISTINCT coalesce(account, owner, '') AS account FROM used_spans LEFT JOIN owners USING (run_id)
UNION
FROM asked;

-- Runs of which nothing is known but a hold.
CREATE TEMP TABLE held_only AS
FROM held_runs
ANTI JOIN (
    SELECT account, run_id FROM run_events SEMI JOIN held_runs USING (account, run_id)
    UNION ALL
    SELECT account, run_id FROM counted_spans SEMI JOIN held_runs USING (account, run_id)
) USING (account, run_id);

-- One pass over everything: where all counts of a run cancel out, but for so many tokens, it has matched. A run belongs to
-- the period of the first thing that is billed for it, else to the one it was first traced in.
CREATE TEMP TABLE runs AS
WITH entries AS (
    SELECT
        account,
        run_id,
        known_as,
        COLUMNS('.*_tokens'),
        CASE WHEN period = getvariable('period') THEN 0 WHEN period < getvariable('period') THEN -1 ELSE 1 END AS when_billed,
        occurred_at AS first_at,
        occurred_at AS last_at
    FROM run_events
    UNION ALL
    SELECT account, run_id, known_as, -COLUMNS('.*_tokens'), NULL, started_at, ended_at
    FROM counted_spans
),
by_model AS (
    SELECT
        account,
        run_id,
        known_as,
        sum(COLUMNS('.*_tokens')),
        min(when_billed) AS when_billed,
        min(first_at) AS first_at,
        max(last_at) AS last_at
    FROM entries
    GROUP BY ALL
),
by_run AS (
    SELECT
        account,
        run_id,
        bool_or(
            greatest(*COLUMNS('.*_tokens')) > getvariable('tolerance_tokens')
            OR least(*COLUMNS('.*_tokens')) < -getvariable('tolerance_tokens')
        ) AS differs,
        min(when_billed) AS when_billed,
        min(first_at) AS first_at,
        max(last_at) AS last_at
    FROM by_model
    GROUP BY ALL
    UNION ALL
    SELECT account, run_id, true, NULL, min(held_at), max(held_at) FROM held_only GROUP BY ALL
),
of_period AS (
    SELECT
        account,
        run_id,
        CASE
            WHEN NOT differs THEN 'matched'
            WHEN last_at >= getvariable('quiet_since')
                OR (account, run_id) IN (SELECT (account, run_id) FROM held_runs WHERE is_open)
            THEN 'pending'
            ELSE 'differs'
        END AS state
    FROM by_run LEFT JOIN periods USING (account)
    WHERE account IN (FROM compared_accounts)
        AND CASE
            WHEN when_billed IS NOT NULL THEN when_billed = 0
            ELSE first_at >= coalesce(period_start, getvariable('month_start'))
                AND first_at < coalesce(period_end, getvariable('month_end'))
        END
)
SELECT account, state, CASE WHEN state = 'differs' THEN run_id END AS run_id, count(*) AS runs
FROM of_period
GROUP BY ALL;

-- What differs, by model and both ways.
CREATE TEMP TABLE billed AS
SELECT account, run_id, known_as, sum(COLUMNS('.*_tokens'))
FROM run_events SEMI JOIN runs USING (account, run_id)
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
    min(started_at) AS started_at,
    max(ended_at) AS ended_at
FROM counted_spans SEMI JOIN runs USING (account, run_id)
GROUP BY ALL;

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
SELECT DISTINCT account, run_id, 0 FROM held_only SEMI JOIN runs USING (account, run_id);

CREATE TEMP TABLE judged AS
FROM differing ORDER BY difference DESC, account, run_id LIMIT (getvariable('most_judged'));
