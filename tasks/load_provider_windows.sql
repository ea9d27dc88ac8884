-- Windows of probes above one number and not above another, a row without a window for a probe that found none; in the
-- order of the columns of the warehouse's provider_windows. The ledger's own database runs it.
SELECT
    p.seq,
    p.credential,
    p.provider,
    p.checked_at,
    p.error,
    w.name,
    w.limit_value,
    w.remaining,
    w.percent_used,
    w.reset_at
FROM provider_probes AS p LEFT JOIN provider_windows AS w ON w.seq = p.seq
WHERE p.{marked} > {above} AND p.{marked} <= {up_to}
ORDER BY p.seq, w.name
