"""Makes the environments of the peers, once: about 6 minutes and 4 GB.

    python scripts/peers/setup.py                  both
    python scripts/peers/setup.py trl

They come to lie in PEERS_HOME (default ~/.cache/adpo_peers), `venv-tunix` and `venv-trl`. What is
there already stays. The versions are those that the tables of docs/ were measured with.
"""

import argparse
import subprocess
import sys
import venv

from common import HOME

# Each line is one call of pip. Tunix asks for jax[tpu] in an extra that is left out here. PyTorch
# comes first: 2.13.0 has a CPU wheel where a newer one would bring CUDA.
PACKAGES = {
    "tunix": [["google-tunix==0.1.7"]],
    "trl": [["torch==2.13.0"], ["trl==1.16.0"]],
}


def make(peer: str) -> None:
    """The environment of one peer, unless it is there."""
    folder = HOME / f"venv-{peer}"
    done = folder / "done"  # an environment that pip was interrupted in has no such file
    if done.exists():
        print(f"{folder} is there")
        return
    venv.create(folder, with_pip=True, clear=True)
    for packages in PACKAGES[peer]:
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *packages], check=True)
    done.touch()
    print(f"{folder} is made")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peers", nargs="*", help=f"of {', '.join(PACKAGES)}; none for all")
    peers = parser.parse_args().peers
    if unknown := sorted(set(peers) - set(PACKAGES)):
        print(f"peers are {', '.join(PACKAGES)}; given {', '.join(unknown)}")
        return 2
    HOME.mkdir(parents=True, exist_ok=True)
    for peer in peers or PACKAGES:
        make(peer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
