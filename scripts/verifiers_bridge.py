r"""Lets a run train in an environment of the package verifiers (docs/environments.md).

    python scripts/verifiers_bridge.py my_taskset --model FOLDER --rows tasks.jsonl --port 9000
    python -m adpo_jax.main --config=... --config.data.train_files=tasks.jsonl \
      --config.data.prompt_key=prompt --config.environment.url=http://127.0.0.1:9000/ \
      --config.custom_reward_function.name=

It runs where verifiers 0.4 is installed and needs nothing of adpo_jax. --rows writes the tasks of
the taskset as training data, once. A row's rollouts are its task's episodes; the tokens go to the
run as verifiers' renderers made them. --config takes an environment's whole settings, as JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import uuid
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from verifiers.v1.clients import ModelContext
from verifiers.v1.configs.client import TrainClientConfig
from verifiers.v1.types import SamplingConfig
from verifiers.v1.utils.loaders import load_environment, resolve_env_config

TASK = "verifiers_task"  # the column of a row that holds its task


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("taskset", help="the name of an installed taskset")
    parser.add_argument("--model", required=True, help="folder or name with the tokenizer")
    parser.add_argument("--config", default="{}", help="settings of the environment, as JSON")
    parser.add_argument("--renderer", help='settings of the renderer, as JSON: {"name": "qwen3"}')
    parser.add_argument("--rows", type=Path, help="write the tasks here, a new file, and serve")
    parser.add_argument("--num-rows", type=int, help="of a taskset that never ends")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--max-concurrent", type=int, default=256, help="episodes under way")
    return parser.parse_args()


def make_environment(a: argparse.Namespace):
    settings = json.loads(a.config)
    settings["taskset"] = settings.get("taskset", {}) | {"id": a.taskset}
    return load_environment(resolve_env_config(settings))


def write_rows(env, path: Path, most: int | None) -> int:
    """Writes each task as a row: its prompt, and all of it as JSON. Returns how many."""
    taskset = env.taskset if most is None else env.taskset.take(most)
    if not taskset.bounded:
        raise SystemExit("this taskset never ends: give --num-rows")
    count = 0
    unfinished = path.with_name(f"{path.name}.tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for task in taskset:
            data = task.data.model_dump(mode="json")
            prompt = data.get("prompt") or str(task.key)
            file.write(json.dumps({"prompt": prompt, TASK: json.dumps(data)}) + "\n")
            count += 1
    os.replace(unfinished, path)
    return count


def record_of(episode) -> dict:
    """The one trained branch of an episode, as a run takes it.

    Its place is taken by `error` where the episode failed, and the row may be asked for again, and
    by `lasting` where that would change nothing. Errors that verifiers' own retries have mended
    stay in `errors`, so `ok` alone says what failed.
    """
    if not episode.ok or not episode.traces:
        failed = [trace for trace in episode.traces if not trace.ok]
        errors = [str(error.message) for part in (episode, *failed) for error in part.errors]
        return {"error": "; ".join(dict.fromkeys(errors)) or "no trace"}
    traces = [trace for trace in episode.traces if trace.agent.trainable]
    branches = [(t, b) for t in traces for b in t.branches if b.trainable and any(b.sampled_mask)]
    if traces and not branches:  # its time may have run out before the first turn
        stops = ", ".join(str(trace.stop_condition) for trace in traces)
        return {"error": f"the policy sampled nothing in it; it ended with {stops}"}
    if len(branches) != 1:
        return {
            "lasting": f"{len(branches)} branches are to be trained on, and a rollout is one: an "
            "environment whose agents are several, or whose prompts do not go on from each other, "
            "cannot be a run's"
        }
    ((trace, branch),) = branches
    if not _is_number(trace.reward):
        given = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
        shown = ", ".join(f"{name} is {v}" for name, v in given.items() if not _is_number(v))
        return {"error": f"its reward is {trace.reward}, and a run takes finite ones: {shown}"}
    ids, mask = branch.token_ids, branch.sampled_mask
    first = mask.index(True)
    last = branch.calls[-1].finish_reason if branch.calls else "stop"
    return {
        "prompt_token_ids": ids[:first],
        "token_ids": ids[first:],
        "mask": [int(bit) for bit in mask[first:]],
        "reward": trace.reward,
        "finish_reason": "length" if last == "length" else "stop",
        "messages": [m.model_dump(mode="json", exclude_none=True) for m in branch.messages],
        "metrics": {name: value for name, value in trace.metrics.items() if _is_number(value)},
    }


def _is_number(value: float | None) -> bool:
    """Whether a run takes it: it is finite, and below 1e30."""
    return value is not None and abs(value) < 1e30


class Bridge:
    """Answers a run's requests with episodes."""

    def __init__(self, env, a: argparse.Namespace):
        self._env, self._model = env, a.model
        self._renderer = json.loads(a.renderer) if a.renderer else None
        self._task = type(env.taskset).task_type()
        self._gate = asyncio.Semaphore(a.max_concurrent)

    async def rollouts(self, request):
        asked = await request.json()
        model = asked["model"]
        # The clients of verifiers read their key from the environment.
        variable = f"ADPO_JAX_RUN_{uuid.uuid4().hex}"
        os.environ[variable] = model["api_key"]
        client = TrainClientConfig(
            base_url=model["base_url"] + "/v1",
            api_key_var=variable,
            renderer_model_name=self._model,
            renderer=self._renderer,
        )
        data = self._task.data_type().model_validate_json(asked["row"][TASK])
        task = self._task(data, self._env.config.taskset.task)

        async def episode(seed: int):
            sampling = SamplingConfig(**asked["sampling_params"], seed=seed)
            ctx = ModelContext(client=client, model=model["name"], sampling=sampling)
            (slot,) = self._env.slots(task)
            return record_of(await self._env.run_slot(slot, ctx, self._gate))

        try:
            records = await asyncio.gather(*map(episode, asked["seeds"]))
        finally:
            os.environ.pop(variable, None)
        for record in records:
            if "lasting" in record:
                return JSONResponse({"error": record["lasting"]}, 422)
        return JSONResponse({"rollouts": records})


def main():
    a = arguments()
    env = make_environment(a)
    if a.rows is not None and not a.rows.exists():
        print(f"{write_rows(env, a.rows, a.num_rows)} tasks are in {a.rows}", flush=True)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with env.serving():
            yield

    bridge = Bridge(env, a)
    routes = [
        Route("/", bridge.rollouts, methods=["POST"]),
        Route("/", lambda _: JSONResponse({"taskset": a.taskset})),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    uvicorn.run(app, host=a.host, port=a.port, access_log=False)


if __name__ == "__main__":
    main()
