"""The same decisions in the words of other servers: which options to set, and what the servers support.

data/servers.toml has the words, with the version, date and source of each entry; the numbers of an assessment go in.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from .assess import Assessment
from .hardware import GIB
from .tables import read_table


@dataclass(frozen=True, slots=True)
class Server:
    """One server: the options for an assessment, and what it supports, a sentence each."""

    name: str
    version: str
    looked_up: str  # on this day
    start: str  # comes before the options
    options: tuple[tuple[str, str], ...]
    file: str  # that holds further options; "" where there is none
    file_options: tuple[tuple[str, str], ...]
    supports: tuple[str, ...]

    @property
    def command(self) -> str:
        """The options as they are written: `--option value` on a command line, `name=value` in Python. A command line
        that needs a file makes it first."""
        if self.start.endswith("("):
            return f"{self.start}{', '.join(f'{name}={value}' for name, value in self.options)})"
        line = " ".join([self.start, *(f"{name} {value}".strip() for name, value in self.options)])
        if not self.file:
            return line
        held = ", ".join(f"{name}: {value}" for name, value in self.file_options)
        return f"echo '{self.file.partition('.')[0]}: {{{held}}}' > {self.file} && {line} --config {self.file}"


def servers(found: Assessment) -> tuple[Server, ...]:
    """vLLM, SGLang, TensorRT-LLM and Hugging Face continuous batching, set up as the assessment advises."""
    host_gib = found.kv_bytes / GIB  # as much host memory as the device has for K and V
    numbers = {  # what a value of the table may name
        "model": shlex.quote(found.model.hub or "MODEL"),
        "num_gpus": found.gpu.count,
        "block_size": found.block_size,
        "max_model_len": found.max_model_len,
        "sequences": found.advised,
        "batch_tokens": found.setup.max_batch_tokens,
        "memory_share": found.setup.constants.memory_share,
        "share_of_free_memory": found.kv_bytes / (found.gpu.memory_bytes - found.model.weight_bytes),
        "kv_bytes": found.kv_bytes,
        "host_gib": host_gib,
        "whole_host_gib": f"{host_gib:.0f}" if host_gib >= 1 else f"{host_gib:.2f}",
    }
    holds = {  # what `when` may name
        "swap": found.swap_from is not None and found.swap_from <= found.mean_length,
        "fp8": found.model.kv_bits == 8,
        "several_gpus": found.gpu.count > 1,
    }

    def chosen(entries: list[dict[str, str]]) -> list[dict[str, str]]:
        held = [each for each in entries if "when" not in each or holds[each["when"]]]
        return [{key: text.format_map(numbers) for key, text in each.items()} for each in held]

    return tuple(
        Server(
            name=server["name"],
            version=server["version"],
            looked_up=str(server["looked_up"]),
            start=server["start"].format_map(numbers),
            options=tuple((each["name"], each["value"]) for each in chosen(server["options"])),
            file=server.get("file", ""),
            file_options=tuple((each["name"], each["value"]) for each in chosen(server.get("file_options", []))),
            supports=tuple(each["text"] for each in chosen(server["supports"])),
        )
        for server in read_table("servers")["server"]
    )
