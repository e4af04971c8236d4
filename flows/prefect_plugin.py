"""Teaches Prefect's command line a bare deployment name: ``prefect deployment run distill-and-ship``.

Prefect's client insists on FLOW/DEPLOYMENT. This plugin (entry point group ``prefect.plugins``, switched on
by ``[tool.prefect.plugins]`` in the project's pyproject.toml) completes a name without a slash before the
client sees it. The method it wraps is no public interface: where Prefect has changed it, the plugin leaves
everything as it is and says which name to use.
"""

import functools
import logging
from typing import Any

import pluggy

CANONICAL_NAME = "distill-and-ship/local"
DEFAULT_DEPLOYMENT = "local"

hookimpl = pluggy.HookimplMarker("prefect-experimental")


@hookimpl
def setup_environment(*, ctx: Any) -> None:
    """Prefect's start-up hook. The argument is keyword-only, as in Prefect's specification of the hook:
    otherwise pluggy refuses the plugin."""
    install(ctx.logger_factory("martlet"))


def install(logger: logging.Logger) -> bool:
    """Wraps the client's look-up by name; true when that was possible."""
    try:
        from prefect.client.orchestration._deployments.client import DeploymentAsyncClient

        original = DeploymentAsyncClient.read_deployment_by_name
    except (ImportError, AttributeError):
        logger.warning(
            "This version of Prefect looks deployments up in another way, so a bare name will not do; "
            "use `prefect deployment run %s`.",
            CANONICAL_NAME,
        )
        return False
    if getattr(original, "completes_bare_names", False):
        return True

    @functools.wraps(original)
    async def read_deployment_by_name(self: Any, name: str, **keywords: Any) -> Any:
        if "/" not in name:
            try:
                name = await complete_name(self, name)
            except Exception:  # whatever another Prefect, or a server that is away, answers
                logger.warning(
                    "The bare name %r could not be completed; use `prefect deployment run %s`.",
                    name,
                    CANONICAL_NAME,
                )
        return await original(self, name, **keywords)

    read_deployment_by_name.completes_bare_names = True  # type: ignore[attr-defined]
    DeploymentAsyncClient.read_deployment_by_name = read_deployment_by_name  # type: ignore[method-assign]
    return True


async def complete_name(client: Any, name: str) -> str:
    """FLOW/DEPLOYMENT for a bare name: the only deployment of that name, the only one of the flow of that
    name, or that flow's deployment ``local``. A name that fits none is returned as it is."""
    flows = {flow.id: flow.name for flow in await client.read_flows()}
    known = [
        (flows.get(deployment.flow_id, ""), deployment.name) for deployment in await client.read_deployments()
    ]
    for found in (
        [pair for pair in known if pair[1] == name],
        [pair for pair in known if pair[0] == name],
        [pair for pair in known if pair == (name, DEFAULT_DEPLOYMENT)],
    ):
        if len(found) == 1:
            return "/".join(found[0])
    return name
