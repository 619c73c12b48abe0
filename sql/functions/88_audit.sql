-- The audit log. What is changed by a row is recorded by a trigger of its table, in the same transaction, whoever
-- changes it; the rest by record_audit.

-- Adds an entry and returns its number. The session names its user and entrance in router.by and router.via; without
-- these it is p_by, else the role of the database.
CREATE OR REPLACE FUNCTION record_audit(
    p_action text, p_object text, p_before text DEFAULT NULL, p_after text DEFAULT NULL, p_by text DEFAULT NULL)
RETURNS bigint
LANGUAGE sql AS $$
    INSERT INTO audit_log (by, via, action, object, before, after)
    VALUES (left(coalesce(nullif(current_setting('router.by', true), ''), p_by, session_user), 200),
            left(coalesce(nullif(current_setting('router.via', true), ''), 'sql'), 20),
            p_action, left(coalesce(p_object, ''), 200), left(p_before, 500), left(p_after, 500))
    RETURNING entry
$$;

CREATE OR REPLACE FUNCTION audit_model_text(p_model roster) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN p_model.model IS NULL THEN NULL
                ELSE format('%s; endpoint %s; target %s; context %s; max tokens %s; timeout %s s; prices %s, %s',
                            p_model.state, p_model.endpoint, coalesce(p_model.default_target, 'none'),
                            coalesce(p_model.context_tokens::text, 'unknown'), p_model.max_tokens,
                            p_model.timeout_seconds, coalesce(p_model.input_price::text, '-'),
                            coalesce(p_model.output_price::text, '-')) END
$$;

-- Of models of config/models.yaml; changes of discovered models are in roster_events.
CREATE OR REPLACE FUNCTION audit_roster() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF audit_model_text(OLD) IS DISTINCT FROM audit_model_text(NEW) THEN
        PERFORM record_audit('models sync', coalesce(NEW.model, OLD.model), audit_model_text(OLD), audit_model_text(NEW));
    END IF;
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER router_audit_added AFTER INSERT ON roster
    FOR EACH ROW WHEN (NEW.source = 'people') EXECUTE FUNCTION audit_roster();
CREATE OR REPLACE TRIGGER router_audit_changed
    AFTER UPDATE OF state, endpoint, source, default_target, context_tokens, max_tokens, timeout_seconds, input_price,
                    output_price ON roster
    FOR EACH ROW WHEN (NEW.source = 'people') EXECUTE FUNCTION audit_roster();
CREATE OR REPLACE TRIGGER router_audit_removed AFTER DELETE ON roster
    FOR EACH ROW WHEN (OLD.source = 'people') EXECUTE FUNCTION audit_roster();

-- Ranks that people gave; those of reviews are in reviews.
CREATE OR REPLACE FUNCTION audit_starting_place() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM record_audit('models sync', format('rank of %s for %s', NEW.model, NEW.category), OLD.place::text, NEW.place::text);
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER router_audit_place AFTER UPDATE OF starting_place ON rankings
    FOR EACH ROW WHEN (OLD.starting_place IS DISTINCT FROM NEW.starting_place) EXECUTE FUNCTION audit_starting_place();

CREATE OR REPLACE FUNCTION audit_category() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM record_audit('models sync', format('category %s', coalesce(NEW.name, OLD.name)),
                         CASE WHEN OLD.name IS NOT NULL THEN 'in use' END, CASE WHEN NEW.name IS NOT NULL THEN 'in use' END);
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER router_audit AFTER INSERT OR DELETE ON categories
    FOR EACH ROW EXECUTE FUNCTION audit_category();

CREATE OR REPLACE FUNCTION audit_roster_event() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM record_audit(
        CASE NEW.what WHEN 'taken' THEN 'models admit' WHEN 'promoted' THEN 'models promote' WHEN 'retired' THEN 'models retire'
                      ELSE 'models undo' END,
        NEW.model, NEW.before -> 'roster' ->> 'state', (SELECT r.state FROM roster r WHERE r.model = NEW.model), NEW."by");
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER router_audit AFTER INSERT ON roster_events
    FOR EACH ROW EXECUTE FUNCTION audit_roster_event();

CREATE OR REPLACE FUNCTION audit_search() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM record_audit('models search', format('search %s', NEW.search), NULL, NULL, NEW."by");
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER router_audit AFTER INSERT ON searches
    FOR EACH ROW EXECUTE FUNCTION audit_search();

CREATE OR REPLACE FUNCTION audit_review() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM record_audit(CASE NEW.kind WHEN 'undo' THEN 'ranking undo' ELSE 'review' END,
                         format('review %s', coalesce(NEW.undoes, NEW.review)), NULL, format('%s ranks changed', NEW.moved), NEW."by");
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER router_audit AFTER INSERT ON reviews
    FOR EACH ROW EXECUTE FUNCTION audit_review();

CREATE OR REPLACE FUNCTION audit_knowledge() RETURNS trigger
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF OLD.checksum IS DISTINCT FROM NEW.checksum THEN
        PERFORM record_audit(CASE WHEN NEW.checksum IS NULL THEN 'knowledge remove' ELSE 'knowledge add' END, NEW.source,
                             'checksum ' || left(OLD.checksum, 12), 'checksum ' || left(NEW.checksum, 12));
    END IF;
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER router_audit AFTER INSERT OR UPDATE OF checksum ON knowledge_sources
    FOR EACH ROW EXECUTE FUNCTION audit_knowledge();

-- Entries from p_since on, newest first.
CREATE OR REPLACE FUNCTION audit_entries(p_since timestamptz, p_limit integer) RETURNS SETOF audit_log
LANGUAGE sql STABLE AS $$
    SELECT a.* FROM audit_log a WHERE p_since IS NULL OR a.at >= p_since ORDER BY a.entry DESC LIMIT p_limit
$$;

-- Deletes entries older than p_days, at most p_limit. Returns how many.
CREATE OR REPLACE FUNCTION prune_audit(p_days double precision, p_limit integer) RETURNS bigint
LANGUAGE sql AS $$
    WITH gone AS (
        DELETE FROM audit_log WHERE entry IN
            (SELECT a.entry FROM audit_log a WHERE a.at < clock_timestamp() - make_interval(secs => p_days * 86400)
              ORDER BY a.at LIMIT p_limit)
        RETURNING entry
    )
    SELECT count(*) FROM gone
$$;
