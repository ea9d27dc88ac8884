-- What the accounts of runs that were not billed sell tokens on, where that is one line alone.
SELECT account, min(line)
FROM run_events
WHERE account IN (SELECT account FROM judged ANTI JOIN billed USING (account, run_id))
GROUP BY account
HAVING min(line) = max(line)
