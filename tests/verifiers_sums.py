"""A taskset of verifiers with a harness of its own: run by test_external."""

import httpx
import verifiers.v1 as vf
from verifiers.v1.runtimes import ProgramResult


class Sum(vf.Task[vf.TaskData]):
    @vf.reward
    async def short(self, trace) -> float:
        return 1.0 / (1 + sum(len(n.token_ids) for n in trace.nodes if n.sampled))

    @vf.metric
    async def turns(self, trace) -> float:
        return float(trace.num_turns)


class Sums(vf.Taskset[Sum]):
    def load(self):
        for i in range(16):
            yield Sum(vf.TaskData(prompt=f"What is {1000 + i} + {2000 + i}?"), self.config.task)


class Chat(vf.Harness[vf.HarnessConfig]):
    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data, url=None):
        messages = [{"role": "user", "content": data.prompt}]
        headers = {"Authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(timeout=120, headers=headers) as client:
            body = {"model": ctx.model, "messages": messages}
            answer = await client.post(f"{endpoint.rstrip('/')}/chat/completions", json=body)
        if answer.status_code != 200:
            return ProgramResult(1, "", answer.text)
        return ProgramResult(0, "", "")


__all__ = ["Chat", "Sums"]
