-- What an account sells tokens on, where that is one line alone.
SELECT account, min(line) FROM run_events WHERE account IN (SELECT account FROM judged) GROUP BY account
HAVING min(line) = max(line)
