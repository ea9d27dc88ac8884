-- Which runs of a billing period may differ between what was billed and what was traced, after `reconcile_tables.sql` and
-- `counted_spans.sql`: in `runs`. An account that is not known is ''.

CREATE TEMP VIEW counted AS
SELECT looked_at.* EXCLUDE (account), coalesce(account, owner, '') AS account, name, coalesce(known_as, 0) AS known_as
FROM looked_at
ANTI JOIN repeats USING (seq)
LEFT JOIN owners USING (run_id)
LEFT JOIN model_names USING (model);

CREATE TEMP TABLE compared_accounts AS
SELECT DISTINCT account FROM (SELECT coalesce(account, owner, '') AS account FROM looked_at LEFT JOIN owners USING (run_id))
UNION
FROM asked;

-- Runs of which nothing is known but a hold.
CREATE TEMP TABLE held_only AS
SELECT account, run_id FROM held_runs SEMI JOIN periods
    ON periods.account = held_runs.account AND held_at >= period_start AND held_at < period_end
ANTI JOIN (
    SELECT account, run_id FROM model_events SEMI JOIN held_runs USING (account, run_id)
    WHERE input_tokens + output_tokens <> 0
    UNION ALL
    SELECT account, run_id FROM counted SEMI JOIN held_runs USING (account, run_id)
) USING (account, run_id);

-- One pass over the period: where all counts of a run cancel out, but for so many tokens, it has matched. Reversals are
-- part of the sums.
CREATE TEMP TABLE runs AS
WITH entries AS (
    SELECT account, run_id, known_as, COLUMNS('.*_tokens') FROM model_events
    WHERE period = getvariable('period') AND input_tokens + output_tokens <> 0
    UNION ALL
    SELECT account, run_id, known_as, -COLUMNS('.*_tokens') FROM counted
),
by_model AS (
    SELECT account, run_id, known_as, sum(COLUMNS('.*_tokens')) FROM entries GROUP BY ALL
),
by_run AS (
    SELECT
        account,
        run_id,
        bool_or(
            greatest(*COLUMNS('.*_tokens')) > getvariable('tolerance_tokens')
            OR least(*COLUMNS('.*_tokens')) < -getvariable('tolerance_tokens')
        ) AS may_differ
    FROM by_model
    GROUP BY ALL
    UNION ALL
    SELECT DISTINCT account, run_id, true FROM held_only
)
SELECT account, CASE WHEN may_differ THEN run_id END AS run_id, count(*) AS runs
FROM by_run
WHERE account IN (FROM compared_accounts)
GROUP BY ALL;
