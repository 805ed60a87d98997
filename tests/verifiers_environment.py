"""An environment of the package verifiers, driven against a server: run by test_serve_tokens.

    python verifiers_environment.py http://127.0.0.1:8000 FOLDER_OF_THE_MODEL

It runs 6 rollouts of 2 turns at once and prints them as JSON.
"""

import asyncio
import json
import sys

import httpx
import verifiers.v1 as vf
from renderers import DefaultRendererConfig
from verifiers.v1.harnesses.null.harness import NullHarnessConfig
from verifiers.v1.runtimes import ProgramResult, SubprocessConfig
from verifiers.v1.types import SamplingConfig


class Chat(vf.Harness[vf.HarnessConfig]):
    """Two turns over the endpoint that verifiers puts before the server."""

    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, url=None):
        messages = [{"role": "user", "content": data.prompt}]
        headers = {"Authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(timeout=120, headers=headers) as client:
            for _ in range(2):
                body = {"model": ctx.model, "messages": messages}
                answer = await client.post(f"{endpoint.rstrip('/')}/chat/completions", json=body)
                if answer.status_code != 200:
                    return ProgramResult(1, "", answer.text)
                messages.append(answer.json()["choices"][0]["message"])
                messages.append({"role": "user", "content": "and 1?"})
        return ProgramResult(0, "", "")


class Sum(vf.Task[vf.TaskData]):
    @vf.reward
    async def turns(self, trace) -> float:
        return float(trace.num_turns)


async def main(address: str, folder: str) -> None:
    renderer = DefaultRendererConfig()
    client = vf.TrainClientConfig(
        base_url=f"{address}/v1", renderer_model_name=folder, renderer=renderer
    )
    config = vf.AgentConfig(
        model="tiny",
        client=client,
        sampling=SamplingConfig(temperature=1.0, max_tokens=6),
        harness=NullHarnessConfig(id="null"),
        runtime=SubprocessConfig(),
    )
    agent = vf.Agent(config)
    agent.harness = Chat(config.harness)
    tasks = [Sum(vf.TaskData(idx=i, prompt=f"{i} + 2?")) for i in range(6)]
    async with agent:
        traces = await asyncio.gather(*map(agent.run, tasks))
    rollouts = [
        {
            "turns": trace.num_turns,
            "reward": trace.rewards["turns"].score,
            "errors": [str(error) for error in trace.errors],
            "sampled": [[node.token_ids, node.logprobs] for node in trace.nodes if node.sampled],
        }
        for trace in traces
    ]
    print(json.dumps(rollouts))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
