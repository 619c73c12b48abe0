-- Knowledge that people added, and the reads of each host's index.

-- Replaces the entries of a source. Returns added, replaced or unchanged. Versions are assigned by one transaction
-- at a time: a reader of version N has seen all lower ones.
CREATE OR REPLACE FUNCTION add_knowledge(
    p_source text, p_checksum text, p_shown_sources text[], p_titles text[], p_bodies text[]) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    before knowledge_sources;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('router knowledge', 0));
    SELECT * INTO before FROM knowledge_sources k WHERE k.source = p_source;
    IF before.checksum = p_checksum THEN
        RETURN 'unchanged';
    END IF;
    INSERT INTO knowledge_sources AS k (source, checksum, version)
    VALUES (p_source, p_checksum, nextval('knowledge_version'))
    ON CONFLICT (source) DO UPDATE
       SET checksum = EXCLUDED.checksum, version = EXCLUDED.version, changed_at = clock_timestamp();
    DELETE FROM knowledge_entries e WHERE e.source = p_source;
    INSERT INTO knowledge_entries (source, place, shown_source, title, body)
    SELECT p_source, part.place, part.shown_source, part.title, part.body
      FROM unnest(p_shown_sources, p_titles, p_bodies) WITH ORDINALITY AS part (shown_source, title, body, place);
    RETURN CASE WHEN before.checksum IS NULL THEN 'added' ELSE 'replaced' END;
END
$$;

-- Deletes the entries of a source. Returns false if there are none.
CREATE OR REPLACE FUNCTION remove_knowledge(p_source text) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    there boolean;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('router knowledge', 0));
    UPDATE knowledge_sources k
       SET checksum = NULL, version = nextval('knowledge_version'), changed_at = clock_timestamp()
     WHERE k.source = p_source AND k.checksum IS NOT NULL;
    there := FOUND;
    DELETE FROM knowledge_entries e WHERE e.source = p_source;
    RETURN there;
END
$$;

-- Identity of this database, independent of its address, and its time.
CREATE OR REPLACE FUNCTION knowledge_state(OUT identity text, OUT now double precision)
LANGUAGE sql AS $$
    SELECT format('%s-%s', i.identity, d.oid), extract(epoch FROM clock_timestamp())::float8
      FROM knowledge_identity i, pg_database d WHERE d.datname = current_database()
$$;

-- Whether a task is indexed as knowledge; does not read its answer. An answer without a rank is from before ranks
-- were stored and counts as the chosen model's. An answer that was cut off by its own max_tokens is none.
CREATE OR REPLACE FUNCTION is_knowledge(p_status text, p_rank integer, p_answer text, p_truncated boolean) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT p_status = 'solved' AND coalesce(p_rank, 3) = 3 AND octet_length(p_answer) > 0 AND p_truncated IS NOT TRUE
$$;

-- Next tasks by descending id, and whether each is knowledge.
CREATE OR REPLACE FUNCTION knowledge_slice(p_from bigint, p_down_to bigint, p_limit integer)
RETURNS TABLE (id bigint, known boolean)
LANGUAGE sql STABLE SET enable_seqscan = off AS $$
    SELECT t.id, is_knowledge(t.status, t.answer_rank, t.answer, t.truncated)
      FROM tasks t WHERE t.id <= p_from AND t.id >= p_down_to ORDER BY t.id DESC LIMIT p_limit
$$;

-- Tasks solved since a time, by id.
CREATE OR REPLACE FUNCTION knowledge_since(p_since double precision, p_after bigint, p_limit integer)
RETURNS TABLE (id bigint)
LANGUAGE sql STABLE AS $$
    SELECT t.id FROM tasks t
     WHERE t.solved_at >= to_timestamp(p_since) AND t.id > p_after
       AND is_knowledge(t.status, t.answer_rank, t.answer, t.truncated)
     ORDER BY t.id LIMIT p_limit
$$;
