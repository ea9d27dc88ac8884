-- What the accounts of runs that were not billed sell tokens on in the period, where that is one line alone.
SELECT account, min(line)
FROM model_events
WHERE period = getvariable('period')
    AND input_tokens + output_tokens <> 0
    AND account IN (SELECT account FROM judged ANTI JOIN billed USING (account, run_id))
GROUP BY account
HAVING min(line) = max(line)
