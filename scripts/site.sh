#!/bin/bash
# The docs as a site: site/index.html, built strict (a dead link or a page outside of the navigation
# is an error). Options are those of `mkdocs build`; `scripts/site.sh serve` shows it while you write.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
command=build
if [[ ${1:-} == serve ]]; then
    command=serve
    shift
fi
export NO_MKDOCS_2_WARNING=1 # of the theme: the version is pinned
exec .venv/bin/python -m mkdocs "$command" --strict --config-file scripts/mkdocs.yml "$@"
