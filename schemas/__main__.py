"""Write every schema file anew."""

from dde_cache.schemas import MODELS, folder, render

for name in MODELS:
    (folder() / f"{name}.json").write_text(render(name))
