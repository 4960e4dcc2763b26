"""The picture of the README: the main job's answer, its network, its flow and two surfaces.

Run it from the repository: ``python docs/make_picture.py`` (about a minute), or give it a saved comparison.
"""

import sys
from pathlib import Path

import skipscope as ss


def main() -> None:
    """Write docs/picture.png."""
    with ss.progress():
        result = ss.load(sys.argv[1]) if len(sys.argv) > 1 else ss.compare()
    print(result.save(Path(__file__).with_name("picture.png"), dpi=150))


if __name__ == "__main__":
    main()
