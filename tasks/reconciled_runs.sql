-- How many runs of each account are left alone, and why.
SELECT account, state, sum(runs) FROM runs WHERE state <> 'differs' GROUP BY ALL
UNION ALL
SELECT account, 'matched', count(*) FROM runs WHERE state = 'differs' AND (account, run_id) NOT IN (
    SELECT (account, run_id) FROM differing
) GROUP BY ALL
UNION ALL
SELECT account, 'not judged', count(*) FROM differing ANTI JOIN judged USING (account, run_id) GROUP BY ALL
ORDER BY ALL
