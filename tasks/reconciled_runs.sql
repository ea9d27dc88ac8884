-- How many runs of each account are left alone, and why.
WITH left_alone AS (
    SELECT account, 'matched' AS state, runs FROM runs WHERE run_id IS NULL
    UNION ALL
    SELECT account, 'matched', 1 FROM runs ANTI JOIN differing USING (account, run_id) WHERE run_id IS NOT NULL
    UNION ALL
    SELECT account, 'pending', 1 FROM pending
    UNION ALL
    SELECT account, 'accepted', 1 FROM accepted_runs
    UNION ALL
    SELECT account, 'not judged', 1 FROM differing
    ANTI JOIN pending USING (account, run_id)
    ANTI JOIN accepted_runs USING (account, run_id)
    ANTI JOIN judged USING (account, run_id)
)
SELECT account, state, sum(runs) FROM left_alone GROUP BY ALL ORDER BY ALL
