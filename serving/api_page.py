"""A page that describes the API from its OpenAPI document, in one piece: it loads nothing from anywhere."""

import html
import json
from typing import Any

_STYLE = """
body { font: 15px/1.5 ui-sans-serif, system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin: 2.5rem 0 .3rem; font-size: 1.1rem; } h2 b { color: #c2410c; }
code, pre { font-family: ui-monospace, monospace; font-size: .85rem; }
pre { background: #8881; padding: .8rem; overflow: auto; }
table { border-collapse: collapse; width: 100%; }
td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8883; }
td:first-child { white-space: nowrap; }
:root { color-scheme: light dark; }
"""


def api_page(document: dict[str, Any], address: str) -> str:
    """document: the app's OpenAPI document; address: the server's, for examples."""
    schemas = document.get("components", {}).get("schemas", {})
    title = html.escape(document["info"]["title"])
    parts = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>{title}</h1><p>{html.escape(document['info']['description'])}</p>")
    parts.append("<p>The same for programs: <a href='openapi.json'>openapi.json</a></p>")
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            parts.append(f"<h2><b>{method.upper()}</b> <code>{html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(about.get('description', about.get('summary', '')))}</p>")
            rows = [(each["name"], each["schema"], each.get("required", False)) for each in about.get("parameters", ())]
            body = about.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            schema = schemas.get(body.get("$ref", "").rpartition("/")[2], {})
            needed = schema.get("required", ())
            rows += [(name, field, name in needed) for name, field in schema.get("properties", {}).items()]
            if rows:
                parts.append(f"<table>{''.join(_row(*row) for row in rows)}</table>")
            for example in schema.get("examples", ()):
                shown = json.dumps(example, ensure_ascii=False)
                call = f"curl {address}{path} -H 'Content-Type: application/json' -d '{shown}'"
                parts.append(f"<pre>{html.escape(call)}</pre>")
    parts.append("<h2>Objects inside the bodies</h2>")
    shown = [name for name, schema in schemas.items() if not name.endswith("Body") and "properties" in schema]
    for name in [each for each in shown if "ValidationError" not in each]:
        rows = "".join(
            _row(field, about, field in schemas[name].get("required", ()))
            for field, about in schemas[name]["properties"].items()
        )
        parts.append(
            f"<h3 id='{name}'><code>{name}</code></h3><p>{html.escape(schemas[name].get('description', ''))}</p>"
        )
        parts.append(f"<table>{rows}</table>")
    return "".join(parts)


def _row(name: str, schema: dict[str, Any], is_required: bool) -> str:
    default = schema.get("default")
    about = schema.get("description", "")
    if default is not None:
        about = f"{about} (default: {json.dumps(default)})".strip()
    kind = html.escape(_kind(schema)) + (", required" if is_required else "")
    return f"<tr><td><code>{html.escape(name)}</code></td><td>{kind}</td><td>{html.escape(about)}</td></tr>"


def _kind(schema: dict[str, Any]) -> str:
    """A field's type in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(each) for each in schema["anyOf"] if each.get("type") != "null"))
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    bounds = [f"{sign} {schema[name]}" for name, sign in (("minimum", "≥"), ("maximum", "≤")) if name in schema]
    return " ".join([schema.get("type", "any"), *bounds])
