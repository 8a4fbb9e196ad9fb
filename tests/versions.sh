#!/usr/bin/env bash
# Runs the tests with the oldest and with the newest versions that pyproject.toml allows, or with the
# versions of tests/requirements.lock, each in an environment of its own:
#
#   tests/versions.sh            # both, all default tests
#   tests/versions.sh oldest tests/losses/test_golden.py tests/test_train.py
#   tests/versions.sh locked
#
# Needs uv (pip install uv), which brings a missing Python along. The newest JAX needs Python 3.12 or
# later; with 3.11 alone, "newest" means the newest that 3.11 can have, and the script says which.
set -euo pipefail
cd "$(dirname "$0")/.."

which=("oldest" "newest")
if [[ "${1:-}" =~ ^(oldest|newest|locked)$ ]]; then
    which=("$1")
    shift
fi

for versions in "${which[@]}"; do
    folder="build/versions/$versions"
    pinned=() warnings=()
    if [[ "$versions" == "oldest" ]]; then
        # Old packages use what newer versions of their own dependencies deprecate.
        python=3.11 resolution=lowest-direct warnings=(-W ignore::DeprecationWarning)
    elif [[ "$versions" == "locked" ]]; then
        python=3.11 resolution=highest pinned=(-c tests/requirements.lock)
    else
        python=3.13 resolution=highest
        uv python find --quiet "$python" > /dev/null || python=3.11
    fi
    uv venv --quiet --clear --python "$python" "$folder"
    uv pip install --quiet --python "$folder/bin/python" --resolution "$resolution" \
        "${pinned[@]}" -e '.[test]'
    echo "$versions: $("$folder/bin/python" -c '
import importlib.metadata as m, platform
names = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "scikit-learn", "pillow")
print("Python", platform.python_version(), *(f"{n} {m.version(n)}" for n in names), sep=", ")')"
    "$folder/bin/python" -m pytest "${warnings[@]}" "$@"
done
