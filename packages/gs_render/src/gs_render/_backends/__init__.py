"""Renderers. Each module has `is_available() -> reason | None` and `render(request) -> RenderOutput`."""
