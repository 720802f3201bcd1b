"""The operations of the contract that this version lacks: each is refused by its name, with what to do instead.

The rows are those of the published clients, 0.40 to 3.x. An operation that is built loses its row here and gets one in
`routes.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from devboxd.http.binding import Absent

_TABLE = (
    (
        "devboxes are not built from blueprints",
        "install what you need in a devbox, take a snapshot of it, and create devboxes from that",
        """
        GET /v1/blueprints blueprints.list
        POST /v1/blueprints blueprints.create
        POST /v1/blueprints/create_from_inspection blueprints.create_from_inspection
        GET /v1/blueprints/list_public blueprints.list_public
        GET /v1/blueprints/metadata/keys blueprints.metadata_keys
        GET /v1/blueprints/metadata/keys/{}/values blueprints.metadata_values
        POST /v1/blueprints/preview blueprints.preview
        GET /v1/blueprints/public/metadata/keys blueprints.public.metadata_keys
        GET /v1/blueprints/public/metadata/keys/{}/values blueprints.public.metadata_values
        GET /v1/blueprints/{} blueprints.retrieve
        POST /v1/blueprints/{}/delete blueprints.delete
        GET /v1/blueprints/{}/logs blueprints.logs
        """,
    ),
    (
        "repositories are not connected",
        "clone them in a devbox by `git clone`, take a snapshot, and create devboxes from that",
        """
        GET /v1/repositories repositories.list
        POST /v1/repositories repositories.create
        GET /v1/repositories/inspections/{} repositories.inspections.retrieve
        GET /v1/repositories/{} repositories.retrieve
        POST /v1/repositories/{}/delete repositories.delete
        POST /v1/repositories/{}/inspect repositories.inspect
        GET /v1/repositories/{}/inspections repositories.inspections.list
        POST /v1/repositories/{}/refresh repositories.refresh
        """,
    ),
    (
        "objects are not stored",
        "upload files to a devbox, and keep them in a snapshot of it",
        """
        GET /v1/objects objects.list
        POST /v1/objects objects.create
        GET /v1/objects/list_public objects.list_public
        GET /v1/objects/metadata/keys objects.metadata_keys
        GET /v1/objects/metadata/keys/{}/values objects.metadata_values
        GET /v1/objects/{} objects.retrieve
        POST /v1/objects/{}/complete objects.complete
        POST /v1/objects/{}/delete objects.delete
        GET /v1/objects/{}/download objects.download
        """,
    ),
    (
        "secrets are not stored",
        "give their values as environment_variables of a devbox",
        """
        GET /v1/secrets secrets.list
        POST /v1/secrets secrets.create
        GET /v1/secrets/id/{} secrets.retrieve_by_id
        POST /v1/secrets/id/{}/delete secrets.delete_by_id
        POST /v1/secrets/id/{}/update secrets.update_by_id
        GET /v1/secrets/{} secrets.retrieve
        POST /v1/secrets/{} secrets.update
        POST /v1/secrets/{}/delete secrets.delete
        """,
    ),
    (
        "agents are not mounted",
        "install them in a devbox, take a snapshot, and create devboxes from that",
        """
        GET /v1/agents agents.list
        POST /v1/agents agents.create
        GET /v1/agents/devbox_counts agents.devbox_counts
        GET /v1/agents/list_public agents.list_public
        GET /v1/agents/{} agents.retrieve
        POST /v1/agents/{}/delete agents.delete
        """,
    ),
    (
        "metadata of devboxes has no index",
        "list the devboxes and read their metadata",
        """
        GET /v1/devboxes/metadata/keys devboxes.metadata_keys
        GET /v1/devboxes/metadata/keys/{}/values devboxes.metadata_values
        """,
    ),
    (
        "ports, terminals and SSH of devboxes are not reached from outside",
        "run commands with executions, which take stdin and stream their output",
        """
        POST /v1/devboxes/{}/create_gateway_token devboxes.create_gateway_token
        POST /v1/devboxes/{}/create_mcp_token devboxes.create_mcp_token
        POST /v1/devboxes/{}/create_pty_tunnel devboxes.create_pty_tunnel
        POST /v1/devboxes/{}/create_ssh_key devboxes.create_ssh_key
        POST /v1/devboxes/{}/create_tunnel devboxes.create_tunnel
        POST /v1/devboxes/{}/enable_tunnel devboxes.enable_tunnel
        POST /v1/devboxes/{}/remove_tunnel devboxes.remove_tunnel
        GET /pty/{} pty.connect
        POST /pty/{}/control pty.control
        """,
    ),
    (
        "devboxes have no network policies of their own",
        "set deny_cidrs for the whole server",
        """
        GET /v1/network-policies network_policies.list
        POST /v1/network-policies network_policies.create
        GET /v1/network-policies/{} network_policies.retrieve
        POST /v1/network-policies/{} network_policies.update
        POST /v1/network-policies/{}/delete network_policies.delete
        """,
    ),
    (
        "devboxes have no gateways",
        "give a devbox the credentials that it may know as environment_variables",
        """
        GET /v1/gateway-configs gateway_configs.list
        POST /v1/gateway-configs gateway_configs.create
        GET /v1/gateway-configs/{} gateway_configs.retrieve
        POST /v1/gateway-configs/{} gateway_configs.update
        POST /v1/gateway-configs/{}/delete gateway_configs.delete
        GET /v1/mcp-configs mcp_configs.list
        POST /v1/mcp-configs mcp_configs.create
        GET /v1/mcp-configs/{} mcp_configs.retrieve
        POST /v1/mcp-configs/{} mcp_configs.update
        POST /v1/mcp-configs/{}/delete mcp_configs.delete
        """,
    ),
    (
        "there are no event logs",
        "stream the output or the logs of a devbox",
        """
        GET /v1/axons axons.list
        POST /v1/axons axons.create
        DELETE /v1/axons/{} axons.delete
        GET /v1/axons/{} axons.retrieve
        POST /v1/axons/{} axons.update
        GET /v1/axons/{}/events axons.events.list
        POST /v1/axons/{}/publish axons.publish
        POST /v1/axons/{}/sql/batch axons.sql.batch
        POST /v1/axons/{}/sql/query axons.sql.query
        GET /v1/axons/{}/subscribe/sse axons.subscribe_sse
        """,
    ),
    (
        "scenarios and benchmarks are not run",
        "create a devbox for each, run the commands in it, and score their output",
        """
        GET /v1/scenarios scenarios.list
        POST /v1/scenarios scenarios.create
        GET /v1/scenarios/list_public scenarios.list_public
        GET /v1/scenarios/metadata/keys scenarios.metadata_keys
        GET /v1/scenarios/metadata/keys/{}/values scenarios.metadata_values
        GET /v1/scenarios/runs scenarios.runs.list
        GET /v1/scenarios/runs/{} scenarios.runs.retrieve
        POST /v1/scenarios/runs/{}/cancel scenarios.runs.cancel
        POST /v1/scenarios/runs/{}/complete scenarios.runs.complete
        POST /v1/scenarios/runs/{}/download_logs scenarios.runs.download_logs
        POST /v1/scenarios/runs/{}/score scenarios.runs.score
        GET /v1/scenarios/scorers scenarios.scorers.list
        POST /v1/scenarios/scorers scenarios.scorers.create
        GET /v1/scenarios/scorers/{} scenarios.scorers.retrieve
        POST /v1/scenarios/scorers/{} scenarios.scorers.update
        POST /v1/scenarios/scorers/{}/validate scenarios.scorers.validate
        POST /v1/scenarios/start_run scenarios.start_run
        GET /v1/scenarios/{} scenarios.retrieve
        POST /v1/scenarios/{} scenarios.update
        POST /v1/scenarios/{}/archive scenarios.archive
        GET /v1/scenarios/{}/runs scenarios.runs.list
        POST /v1/scenarios/{}/unarchive scenarios.unarchive
        GET /v1/benchmarks benchmarks.list
        POST /v1/benchmarks benchmarks.create
        GET /v1/benchmarks/list_public benchmarks.list_public
        GET /v1/benchmarks/metadata/keys benchmarks.metadata_keys
        GET /v1/benchmarks/metadata/keys/{}/values benchmarks.metadata_values
        GET /v1/benchmarks/runs benchmarks.runs.list
        GET /v1/benchmarks/runs/{} benchmarks.runs.retrieve
        POST /v1/benchmarks/runs/{}/cancel benchmarks.runs.cancel
        POST /v1/benchmarks/runs/{}/complete benchmarks.runs.complete
        POST /v1/benchmarks/runs/{}/download_logs benchmarks.runs.download_logs
        GET /v1/benchmarks/runs/{}/scenario_runs benchmarks.runs.scenario_runs.list
        POST /v1/benchmarks/start_run benchmarks.start_run
        GET /v1/benchmarks/{} benchmarks.retrieve
        POST /v1/benchmarks/{} benchmarks.update
        POST /v1/benchmarks/{}/archive benchmarks.archive
        GET /v1/benchmarks/{}/definitions benchmarks.definitions
        GET /v1/benchmarks/{}/runs benchmarks.runs.list
        POST /v1/benchmarks/{}/scenarios benchmarks.scenarios
        POST /v1/benchmarks/{}/unarchive benchmarks.unarchive
        GET /v1/benchmark_runs benchmark_runs.list
        GET /v1/benchmark_runs/{} benchmark_runs.retrieve
        POST /v1/benchmark_runs/{}/cancel benchmark_runs.cancel
        POST /v1/benchmark_runs/{}/complete benchmark_runs.complete
        POST /v1/benchmark_runs/{}/download_logs benchmark_runs.download_logs
        GET /v1/benchmark_runs/{}/scenario_runs benchmark_runs.scenario_runs.list
        GET /v1/benchmark_jobs benchmark_jobs.list
        POST /v1/benchmark_jobs benchmark_jobs.create
        GET /v1/benchmark_jobs/{} benchmark_jobs.retrieve
        """,
    ),
    (
        "keys are not made over the API",
        "run `devboxd keys create` on the server",
        """
        POST /v1/apikeys apikeys.create
        POST /v1/restricted_keys restricted_keys.create
        """,
    ),
    (
        "browsers and desktops have no operations of their own",
        "install them in a devbox and drive them by commands",
        """
        POST /v1/devboxes/browsers devboxes.browsers.create
        GET /v1/devboxes/browsers/{} devboxes.browsers.retrieve
        POST /v1/devboxes/computers devboxes.computers.create
        GET /v1/devboxes/computers/{} devboxes.computers.retrieve
        POST /v1/devboxes/computers/{}/keyboard_interaction devboxes.computers.keyboard_interaction
        POST /v1/devboxes/computers/{}/mouse_interaction devboxes.computers.mouse_interaction
        POST /v1/devboxes/computers/{}/screen_interaction devboxes.computers.screen_interaction
        """,
    ),
    (
        "language servers have no operations of their own",
        "install one in a devbox and run it as an execution with stdin attached",
        """
        POST /v1/devboxes/{}/lsp/apply-code-action devboxes.lsp.apply_code_action
        POST /v1/devboxes/{}/lsp/code-actions devboxes.lsp.code_actions
        POST /v1/devboxes/{}/lsp/diagnostics devboxes.lsp.diagnostics
        POST /v1/devboxes/{}/lsp/document-symbols devboxes.lsp.document_symbols
        POST /v1/devboxes/{}/lsp/file devboxes.lsp.file
        POST /v1/devboxes/{}/lsp/file-definition devboxes.lsp.file_definition
        GET /v1/devboxes/{}/lsp/files devboxes.lsp.files
        POST /v1/devboxes/{}/lsp/formatting devboxes.lsp.formatting
        POST /v1/devboxes/{}/lsp/get-code-actions-for-diagnostic devboxes.lsp.get_code_actions_for_diagnostic
        POST /v1/devboxes/{}/lsp/get-code-segment-info devboxes.lsp.get_code_segment_info
        POST /v1/devboxes/{}/lsp/get-signature-help devboxes.lsp.get_signature_help
        GET /v1/devboxes/{}/lsp/health devboxes.lsp.health
        POST /v1/devboxes/{}/lsp/references devboxes.lsp.references
        POST /v1/devboxes/{}/lsp/set-watch-directory devboxes.lsp.set_watch_directory
        """,
    ),
)
"""Why, what to do instead, and the operations: method, path, name in the clients."""


def _rows() -> Iterator[Absent]:
    for why, instead, operations in _TABLE:
        for line in operations.split("\n"):
            if line.strip():
                method, path, name = line.split()
                yield Absent(method, path, name, why, instead)


UNIMPLEMENTED = tuple(_rows())
