-- Low-water marks of lanes, and where claims start.

-- Published low-water mark of one half of a lane, or of one client's part of it. Client '*': all clients.
CREATE OR REPLACE FUNCTION low_watermark(p_category text, p_priority smallint, p_came_back boolean, p_client text DEFAULT '*')
RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT w.position FROM queue_watermarks w
                      WHERE w.category = p_category AND w.priority = p_priority AND w.client = p_client
                        AND w.came_back = p_came_back AND w.published
                      ORDER BY w.position DESC LIMIT 1),
                    CASE WHEN p_came_back THEN -4611686018427387904 ELSE 1 END)
$$;

-- Lowest ready position of a lane, or of one client's part of it, in [p_from, p_below).
CREATE OR REPLACE FUNCTION min_ready_position(
    p_category text, p_priority smallint, p_client text, p_from bigint, p_below bigint) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN p_client = '*'
                THEN (SELECT q.position FROM queue q
                       WHERE q.state = 'ready' AND q.category = p_category AND q.priority = p_priority
                         AND q.position >= p_from AND q.position < p_below
                       ORDER BY q.position LIMIT 1)
                ELSE (SELECT q.position FROM queue q
                       WHERE q.state = 'ready' AND q.category = p_category AND q.priority = p_priority
                         AND (q.client, q.position) >= (p_client, p_from) AND (q.client, q.position) < (p_client, p_below)
                       ORDER BY q.client, q.position LIMIT 1) END
$$;

-- Advances the low-water mark of one half of a lane in two steps. The first step records the lowest ready position
-- as a candidate, together with the blocking transactions: those that may still add a row below it. A later step
-- publishes the candidate once they have ended. A position is taken from the sequence after its transaction has
-- locked `queue`, so the current holders of that lock are all possible blocking transactions.
-- The steps need separate snapshots; outside READ COMMITTED the function does nothing. A prepared transaction
-- ('-1/...') changes its name when it is prepared, so each of them blocks publication.
CREATE OR REPLACE FUNCTION advance_low_watermark(
    p_category text, p_priority smallint, p_came_back boolean, p_client text DEFAULT '*') RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    base bigint := CASE WHEN p_came_back THEN -4611686018427387904 ELSE 0 END;
    below bigint := CASE WHEN p_came_back THEN 0 ELSE 9223372036854775807 END;
    watermark bigint;
    pending queue_watermarks;
    bound bigint;
    others text[];
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed'
       OR NOT pg_try_advisory_xact_lock(hashtext('router_watermark'), hashtext(p_category || '/' || p_priority || '/' || p_client)) THEN
        RETURN;
    END IF;
    watermark := low_watermark(p_category, p_priority, p_came_back, p_client);
    SELECT * INTO pending FROM queue_watermarks w
     WHERE w.category = p_category AND w.priority = p_priority AND w.client = p_client AND w.came_back = p_came_back
       AND NOT w.published
     ORDER BY w.position DESC LIMIT 1;
    IF pending.position > watermark THEN
        IF EXISTS (SELECT FROM pg_locks l
                    WHERE l.locktype = 'relation' AND l.relation = 'queue'::regclass
                      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
                      AND (l.virtualtransaction = ANY (pending.witnesses) OR l.virtualtransaction LIKE '-1/%')) THEN
            RETURN;
        END IF;
        watermark := greatest(watermark, least(pending.position, coalesce(
            min_ready_position(p_category, p_priority, p_client, watermark, below), pending.position)));
        DELETE FROM queue_watermarks w
         WHERE w.category = p_category AND w.priority = p_priority AND w.client = p_client AND w.came_back = p_came_back;
        INSERT INTO queue_watermarks (category, priority, came_back, published, position, client)
        VALUES (p_category, p_priority, p_came_back, true, watermark, p_client);
    END IF;

    SELECT base + s.last_value + s.is_called::int INTO bound FROM queue_position s;
    SELECT coalesce(array_agg(l.virtualtransaction), '{}') INTO others FROM pg_locks l
     WHERE l.locktype = 'relation' AND l.relation = 'queue'::regclass AND l.pid IS DISTINCT FROM pg_backend_pid()
       AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
       AND l.mode = 'RowExclusiveLock';
    bound := least(bound, coalesce(min_ready_position(p_category, p_priority, p_client, watermark, below), bound));
    IF bound > watermark THEN
        INSERT INTO queue_watermarks (category, priority, came_back, published, position, witnesses, client)
        VALUES (p_category, p_priority, p_came_back, false, bound, others, p_client);
    END IF;
END
$$;

-- Position from which claims search one half of a lane, or one client's part of it.
CREATE OR REPLACE FUNCTION claim_start(p_category text, p_priority smallint, p_came_back boolean, p_client text DEFAULT '*')
RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT greatest(low_watermark(p_category, p_priority, p_came_back, p_client),
                    (SELECT s.position FROM queue_skips s
                      WHERE s.category = p_category AND s.priority = p_priority AND s.client = p_client
                        AND s.came_back = p_came_back AND s.until > clock_timestamp()
                      ORDER BY s.until DESC LIMIT 1))
$$;
