// Gives the sockets and links of this pack's own types a colour each, where the theme has none for them.
import { app } from "../../scripts/app.js";

const COLOURS = { AD_REFERENCE: "#D6468B", AD_REGIONS: "#A3B83C", AD_WINDOWS: "#5C7CFA" };

function paint() {
  for (const table of [app.canvas?.default_connection_color_byType, globalThis.LGraphCanvas?.link_type_colors])
    for (const [type, colour] of Object.entries(COLOURS)) if (table) table[type] ||= colour;
}

app.registerExtension({
  name: "AttentionDistillation.Colours",
  setup() {
    // The nodes that are drawn as elements of the page take their colours from here; a theme's own come before them.
    const style = document.createElement("style");
    style.textContent = `:root { ${Object.entries(COLOURS).map(([t, c]) => `--color-datatype-${t}: ${c};`).join(" ")} }`;
    document.head.append(style);
    // A theme that is loaded clears what it does not name.
    app.ui.settings.addEventListener("Comfy.ColorPalette.change", () => setTimeout(paint));
  },
  nodeCreated: paint,
  afterConfigureGraph: paint,
});
