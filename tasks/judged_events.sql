-- Every event of the runs to be judged, reversals included, whenever it was.
SELECT
    seq,
    event_id,
    account,
    run_id,
    requests,
    plan_version,
    line,
    provider,
    model,
    name AS known_as,
    service_tier,
    occurred_at,
    COLUMNS('.*_tokens'),
    quantity,
    billable,
    platform_paid,
    cost
FROM model_events SEMI JOIN judged USING (account, run_id)
ORDER BY seq
