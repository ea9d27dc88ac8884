-- The last event that may be loaded: costs are booked in the order of events.
SELECT coalesce(max(seq), 0) AS last, 0 AS is_ahead FROM event_costs
