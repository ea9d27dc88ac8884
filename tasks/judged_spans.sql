-- What was traced of each model in the runs to be judged.
SELECT * EXCLUDE (name, known_as), name AS known_as FROM traced SEMI JOIN judged USING (account, run_id) ORDER BY ALL
