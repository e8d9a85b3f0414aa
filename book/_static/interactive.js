// Puts a live chart in the place of the picture of every figure.interactive; without a script the picture stays.
(() => {
  const here = document.currentScript.src;
  const load = () =>
    new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = new URL("vega.js", here).href;
      script.onload = done;
      script.onerror = failed;
      document.head.append(script);
    });

  const isDark = () => document.documentElement.dataset.theme === "dark";

  async function draw(figure) {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    // What a reader has set stays set.
    for (const param of spec.params ?? [])
      if (figure.view && "bind" in param) param.value = figure.view.signal(param.name);
    figure.view?.finalize();
    const { view } = await window.vegaEmbed(figure.querySelector(".live"), spec, {
      actions: false,
      renderer: "svg",
      theme: isDark() ? "dark" : undefined,
      config: { background: "transparent", axis: { gridColor: isDark() ? "#444" : "#ddd" } },
    });
    // A click or tap on a head chooses it, as its two controls do.
    view.addEventListener("click", (_, item) => {
      if (item?.datum && "seen_head" in view.getState().signals && "head" in item.datum)
        view.signal("seen_layer", item.datum.layer).signal("seen_head", item.datum.head).runAsync();
    });
    figure.view = view;
    figure.classList.add("drawn");
  }

  async function start() {
    const figures = [...document.querySelectorAll("figure.interactive")];
    if (!figures.length) return;
    await load();
    const all = () => Promise.all(figures.map(draw));
    await all();
    new MutationObserver(all).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    let waiting, width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth === width) return;
      width = window.innerWidth;
      clearTimeout(waiting);
      waiting = setTimeout(all, 300);
    });
  }

  document.addEventListener("DOMContentLoaded", start);
})();
