-- The last event that may be loaded: costs are booked in the order of events. The newest may be archived.
SELECT
    max(
        coalesce((SELECT max(seq) FROM event_costs), 0),
        coalesce((SELECT max(seq_to) FROM archives), 0)
    ) AS last,
    0 AS is_ahead
