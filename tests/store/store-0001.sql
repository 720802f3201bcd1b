BEGIN TRANSACTION;
CREATE TABLE accounts (
	id VARCHAR(64) NOT NULL, 
	name TEXT NOT NULL, 
	create_time_ms BIGINT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE devboxes (
	id VARCHAR(64) NOT NULL, 
	account_id VARCHAR(64) NOT NULL, 
	name TEXT, 
	status VARCHAR(32) NOT NULL, 
	create_time_ms BIGINT NOT NULL, 
	end_time_ms BIGINT, 
	deadline_ms BIGINT NOT NULL, 
	failure_reason VARCHAR(32), 
	shutdown_reason VARCHAR(32), 
	transitions TEXT NOT NULL, 
	metadata TEXT NOT NULL, 
	launch_parameters TEXT NOT NULL, 
	environment TEXT NOT NULL, 
	file_mounts TEXT NOT NULL, 
	entrypoint TEXT, 
	prepared BOOLEAN NOT NULL, 
	disk_freed BOOLEAN NOT NULL, 
	swept BOOLEAN NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE executions (
	id VARCHAR(64) NOT NULL, 
	devbox_id VARCHAR(64) NOT NULL, 
	handle VARCHAR(128) NOT NULL, 
	purpose VARCHAR(16) NOT NULL, 
	command TEXT NOT NULL, 
	shell_name TEXT, 
	attach_stdin BOOLEAN NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	exit_status INTEGER, 
	error TEXT, 
	stdout_length BIGINT, 
	stderr_length BIGINT, 
	stdout_truncated BOOLEAN NOT NULL, 
	stderr_truncated BOOLEAN NOT NULL, 
	stdin_length BIGINT NOT NULL, 
	stdin_eof BOOLEAN NOT NULL, 
	create_time_ms BIGINT NOT NULL, 
	end_time_ms BIGINT, 
	PRIMARY KEY (id)
);
CREATE TABLE keys (
	id VARCHAR(64) NOT NULL, 
	account_id VARCHAR(64) NOT NULL, 
	name TEXT NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	create_time_ms BIGINT NOT NULL, 
	expires_at_ms BIGINT, 
	revoke_time_ms BIGINT, 
	PRIMARY KEY (id), 
	UNIQUE (hash)
);
CREATE TABLE requests (
	"key" VARCHAR(64) NOT NULL, 
	body_hash VARCHAR(64) NOT NULL, 
	ref VARCHAR(128), 
	status INTEGER, 
	headers TEXT, 
	answer BLOB, 
	create_time_ms BIGINT NOT NULL, 
	PRIMARY KEY ("key")
);
CREATE INDEX ix_requests_create_time_ms ON requests (create_time_ms);
CREATE INDEX devboxes_by_account ON devboxes (account_id, id);
CREATE INDEX devboxes_by_status ON devboxes (status);
CREATE UNIQUE INDEX executions_by_handle ON executions (devbox_id, handle);
CREATE INDEX executions_by_status ON executions (devbox_id, status);
COMMIT;
