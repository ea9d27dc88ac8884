-- What a reconciliation is told, and what it looks at first: the events and spans of a period. Variables: period, since,
-- until, month_start, month_end. known_as is 0 where no model is named.
CREATE TEMP TABLE model_names (model VARCHAR, name VARCHAR, known_as SMALLINT);
CREATE TEMP TABLE held_runs (account VARCHAR, run_id VARCHAR, is_open BOOLEAN, held_at TIMESTAMPTZ);
CREATE TEMP TABLE periods (account VARCHAR, period_start TIMESTAMPTZ, period_end TIMESTAMPTZ);
CREATE TEMP TABLE asked (account VARCHAR);
-- Accounts that spans name and the ledger does not have.
CREATE TEMP TABLE strangers (account VARCHAR, is_strange BOOLEAN);
CREATE TEMP TABLE accepted (account VARCHAR, run_id VARCHAR, state VARCHAR);

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

CREATE TEMP VIEW known_spans AS
SELECT * EXCLUDE (account, is_strange), CASE WHEN is_strange THEN NULL ELSE account END AS account
FROM spans LEFT JOIN strangers USING (account)
WHERE input_tokens + output_tokens > 0;

CREATE TEMP VIEW looked_at AS
SELECT * EXCLUDE (period_start, period_end)
FROM known_spans LEFT JOIN (
    FROM periods WHERE period_start <> getvariable('month_start') OR period_end <> getvariable('month_end')
) USING (account)
WHERE started_at >= getvariable('since') AND started_at < getvariable('until')
    AND started_at >= coalesce(period_start, getvariable('month_start'))
    AND started_at < coalesce(period_end, getvariable('month_end'));

-- The same, and maybe more: which of them repeat others is the same for all accounts.
CREATE TEMP VIEW with_tokens AS
FROM spans
WHERE started_at >= getvariable('since') AND started_at < getvariable('until') AND input_tokens + output_tokens > 0;
