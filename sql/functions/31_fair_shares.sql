-- Weighted fair shares: clients with new tasks in the same lane take turns.
--
-- A schedule gives each client of a lane as many slots as its weight says. A claim takes a number from a sequence,
-- which leads to a slot, and so to a client; it claims that client's first task. Over any `slots` turns each client has
-- exactly its slots, evenly spread, whatever the number of workers: nothing is updated, nothing is locked, and a client
-- that had nothing to do has no credit. A client without a ready task loses its turn to the next ones, so that no turn
-- is idle while any client has work. A turn is one task, whatever its length. Requeued tasks had their turn before.
--
-- Schedules are made again every second, from the index: only clients with ready tasks are in. Until then a new client's
-- tasks are claimed once the others have none. A lane with tasks of one client has no schedule, and costs no more than
-- one.

-- Locks the first ready new task of the client whose turn it is, that this model may claim. After six turns of clients
-- without one, or 60 of clients in p_skip, goes on with the next clients that have one. NULL if there is none. Looks at a
-- client's first 250 tasks, of which an edit may have locked 200. The pair in the condition ties it to the index of clients.
--
-- One statement and few expressions for a turn: each is planned again in every transaction.
CREATE OR REPLACE FUNCTION lock_next_turn(p_model text, p_lane fair_schedules, p_skip text[]) RETURNS queue
LANGUAGE plpgsql AS $$
DECLARE
    found_row queue;
    slot bigint;
    named text;
    next_slot bigint;  -- once set, the clients are taken in order
    turns integer := 0;
    without integer := 0;
    began timestamptz;
BEGIN
    LOOP
        slot := coalesce(next_slot, nextval(p_lane.turns) % p_lane.slots * p_lane.step % p_lane.slots);
        SELECT q.* INTO found_row
          FROM (SELECT s.client FROM fair_slots s
                 WHERE s.schedule = p_lane.schedule AND s.upto > slot ORDER BY s.upto LIMIT 1) AS turn
         CROSS JOIN LATERAL (  -- the same as claim_start, which would be planned again
              SELECT greatest(1, (SELECT w.position FROM queue_watermarks w
                                   WHERE w.category = p_lane.category AND w.priority = p_lane.priority
                                     AND w.client = turn.client AND NOT w.came_back AND w.published
                                   ORDER BY w.position DESC LIMIT 1),
                              (SELECT s.position FROM queue_skips s
                                WHERE s.category = p_lane.category AND s.priority = p_lane.priority
                                  AND s.client = turn.client AND NOT s.came_back AND s.until > clock_timestamp()
                                ORDER BY s.until DESC LIMIT 1)) AS start OFFSET 0) AS here
         CROSS JOIN LATERAL (
              SELECT r.ctid FROM queue r
               WHERE r.state = 'ready' AND r.category = p_lane.category AND r.priority = p_lane.priority
                 AND (r.client, r.position) >= (turn.client, here.start)
                 AND (r.client, r.position) <= (turn.client, 9223372036854775807)
                 AND (r.not_by IS NULL OR NOT p_model = ANY (r.not_by) OR r.not_by_until < clock_timestamp())
               ORDER BY r.client, r.position LIMIT 250) AS first
          JOIN queue q ON q.ctid = first.ctid AND q.state = 'ready'
         WHERE turn.client <> ALL (p_skip)
         LIMIT 1 FOR UPDATE OF q SKIP LOCKED;
        EXIT WHEN FOUND;

        SELECT s.client INTO named FROM fair_slots s WHERE s.schedule = p_lane.schedule AND s.upto > slot ORDER BY s.upto LIMIT 1;
        IF named <> ALL (p_skip) THEN
            began := clock_timestamp();
            PERFORM has_ready(p_lane.category, p_lane.priority, named);
            IF clock_timestamp() - began > interval '2 ms' THEN
                PERFORM skip_uncommitted(p_lane.category, p_lane.priority, false, clock_timestamp() - began, named);
            END IF;
            without := without + 1;
        END IF;
        turns := turns + 1;
        IF turns >= 60 OR without >= 6 THEN
            SELECT n.upto - 1 INTO next_slot FROM next_with_ready(p_lane, coalesce(next_slot + 1, slot), p_skip) AS n;
            EXIT WHEN next_slot IS NULL OR without >= 30;
        END IF;
    END LOOP;
    RETURN found_row;
END
$$;

-- The next client of a schedule after this slot that has a ready new task, with the end of its slots.
CREATE OR REPLACE FUNCTION next_with_ready(p_lane fair_schedules, p_slot bigint, p_skip text[], OUT client text, OUT upto bigint)
LANGUAGE sql STABLE AS $$
    SELECT n.client, n.upto
      FROM ((SELECT s.client, s.upto FROM fair_slots s
              WHERE s.schedule = p_lane.schedule AND s.upto > p_slot AND s.client <> ALL (p_skip)
                AND has_ready(p_lane.category, p_lane.priority, s.client) ORDER BY s.upto)
            UNION ALL
            (SELECT s.client, s.upto FROM fair_slots s
              WHERE s.schedule = p_lane.schedule AND s.upto <= p_slot AND s.client <> ALL (p_skip)
                AND has_ready(p_lane.category, p_lane.priority, s.client) ORDER BY s.upto)) AS n
     LIMIT 1
$$;

-- Whether a client has a ready new task in a lane.
CREATE OR REPLACE FUNCTION has_ready(p_category text, p_priority smallint, p_client text) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT min_ready_position(p_category, p_priority, p_client, greatest(1, claim_start(p_category, p_priority, false, p_client)),
                              9223372036854775807) IS NOT NULL
$$;

-- Makes the schedules of all lanes if they are due, or overdue by p_overdue. At most a twentieth of the time is spent on
-- it, also where rows that no snapshot may remove make it slow.
CREATE OR REPLACE FUNCTION make_schedules_if_due(p_overdue interval DEFAULT '0 s') RETURNS void
LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off SET lock_timeout = '200ms' AS $$
DECLARE
    began timestamptz := clock_timestamp();
    due bigint := (SELECT last_value FROM fair_shares_due);
    lane record;
BEGIN
    IF extract(epoch FROM began - p_overdue) * 1000 < due OR NOT pg_try_advisory_xact_lock(hashtext('router_fair_shares'), 0) THEN
        RETURN;
    END IF;
    FOR lane IN
        SELECT l.category, l.priority FROM queue_lanes l UNION SELECT f.category, f.priority FROM fair_schedules f
    LOOP
        PERFORM make_schedule(lane.category, lane.priority);
    END LOOP;
    PERFORM setval('fair_shares_due',
                   (extract(epoch FROM clock_timestamp() + greatest(interval '1 s', (clock_timestamp() - began) * 20)) * 1000)::bigint);
END
$$;

-- Makes the schedule of one lane, unless nothing has changed. Of more than p_most clients, each schedule has the next ones.
-- The schedule before stays: claims may be using it.
CREATE OR REPLACE FUNCTION make_schedule(p_category text, p_priority smallint, p_most integer DEFAULT 2000) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off AS $$
DECLARE
    former fair_schedules;
    made fair_schedules;
    clients text[];
    weights bigint[];
    own bigint;
    divisor bigint := 0;
BEGIN
    SELECT * INTO former FROM fair_schedules f
     WHERE f.category = p_category AND f.priority = p_priority ORDER BY f.schedule DESC LIMIT 1;
    clients := clients_with_ready(p_category, p_priority, former.last_client, NULL, p_most);
    IF former.last_client IS NOT NULL THEN
        clients := clients || clients_with_ready(p_category, p_priority, NULL, former.last_client, p_most - cardinality(clients));
    END IF;
    IF cardinality(clients) <= 1 THEN
        DELETE FROM fair_slots s USING fair_schedules f
         WHERE s.schedule = f.schedule AND f.category = p_category AND f.priority = p_priority;
        DELETE FROM fair_schedules f WHERE f.category = p_category AND f.priority = p_priority;
        RETURN;
    END IF;
    made.last_client := CASE WHEN cardinality(clients) = p_most THEN clients[p_most] END;
    SELECT array_agg(c.client ORDER BY c.client), array_agg(greatest(1, round(c.weight * u.unit)) ORDER BY c.client)
      INTO clients, weights
      FROM (SELECT given.client, coalesce(w.weight, s.client_weight) AS weight
              FROM queue_settings s, unnest(clients) AS given (client)
              LEFT JOIN client_weights w ON w.client = given.client) AS c
     CROSS JOIN (SELECT CASE WHEN bool_and(w.weight = trunc(w.weight)) THEN 1
                             WHEN bool_and(w.weight = trunc(w.weight, 1)) THEN 10 ELSE 1000 END AS unit
                   FROM (SELECT weight FROM client_weights UNION ALL SELECT client_weight FROM queue_settings) AS w) AS u;
    FOREACH own IN ARRAY weights LOOP
        divisor := gcd(divisor, own);
    END LOOP;
    made.signature := md5(clients::text || weights::text);
    IF (former.signature, former.last_client) IS NOT DISTINCT FROM (made.signature, made.last_client) THEN
        RETURN;
    END IF;
    made.slots := (SELECT sum(w / divisor) FROM unnest(weights) AS w);
    made.turns := coalesce(former.turns, (
        SELECT r.turns FROM (SELECT format('fair_turns_%s', n)::regclass AS turns, n FROM generate_series(0, 31) AS n) AS r
         ORDER BY (SELECT count(*) FROM fair_schedules f WHERE f.turns = r.turns), r.n LIMIT 1));
    INSERT INTO fair_schedules (category, priority, slots, step, turns, signature, last_client)
    VALUES (p_category, p_priority, made.slots, even_step(made.slots), made.turns, made.signature, made.last_client)
    RETURNING schedule INTO made.schedule;
    INSERT INTO fair_slots (schedule, upto, client)
    SELECT made.schedule, sum(c.weight / divisor) OVER (ORDER BY c.number), c.client
      FROM unnest(clients, weights) WITH ORDINALITY AS c (client, weight, number);
    DELETE FROM fair_slots s USING fair_schedules f
     WHERE s.schedule = f.schedule AND f.category = p_category AND f.priority = p_priority AND f.schedule < former.schedule;
    DELETE FROM fair_schedules f WHERE f.category = p_category AND f.priority = p_priority AND f.schedule < former.schedule;
    IF (SELECT count(*) FROM queue_watermarks w WHERE w.category = p_category AND w.priority = p_priority) > 1000 + 4 * cardinality(clients) THEN
        DELETE FROM queue_watermarks w
         WHERE w.category = p_category AND w.priority = p_priority AND w.client <> '*' AND w.client <> ALL (clients);
    END IF;
END
$$;

-- The first p_most clients with ready tasks in a lane, in order: those after p_after, up to and with p_upto.
CREATE OR REPLACE FUNCTION clients_with_ready(
    p_category text, p_priority smallint, p_after text, p_upto text, p_most integer) RETURNS text[]
LANGUAGE plpgsql STABLE AS $$
DECLARE
    found_clients text[] := '{}';
    last_client text := coalesce(p_after, '');
    last_position bigint := CASE WHEN p_after IS NULL THEN -9223372036854775808 ELSE 9223372036854775807 END;
BEGIN
    WHILE cardinality(found_clients) < p_most LOOP
        SELECT q.client INTO last_client FROM queue q
         WHERE q.state = 'ready' AND q.category = p_category AND q.priority = p_priority
           AND (q.client, q.position) > (last_client, last_position)
         ORDER BY q.client, q.position LIMIT 1;
        EXIT WHEN NOT FOUND OR last_client > p_upto;
        found_clients := array_append(found_clients, last_client);
        last_position := 9223372036854775807;
    END LOOP;
    RETURN found_clients;
END
$$;

-- A step near the golden ratio of the slots, without a common divisor: turns spread evenly over all slots.
CREATE OR REPLACE FUNCTION even_step(p_slots bigint) RETURNS bigint
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    step bigint := greatest(1, round(p_slots * 0.6180339887498949))::bigint;
BEGIN
    WHILE gcd(step, p_slots) <> 1 LOOP
        step := step + 1;
    END LOOP;
    RETURN step;
END
$$;
