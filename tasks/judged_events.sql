-- Every event of the runs to be judged, reversals included.
SELECT
    seq,
    event_id,
    account,
    run_id,
    requests,
    period,
    plan_version,
    line,
    provider,
    model,
    name AS known_as,
    service_tier,
    caller_type,
    occurred_at,
    COLUMNS('.*_tokens'),
    quantity,
    billable,
    platform_paid,
    cost
FROM suspect_events SEMI JOIN judged USING (account, run_id)
ORDER BY seq
