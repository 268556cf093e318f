// JupyterLab takes the arrow keys from a list, and ipywidgets reads out a slider's index.
(function mend() {
  const box = element.closest(".widget-vbox"), find = (part) => [...box.querySelectorAll(part)];
  if (!box || find(".widget-slider").some((one) => !one.querySelector(".noUi-handle")))
    return setTimeout(mend, 50);                            // not all of it is on the page yet
  find("select").forEach((list) => list.setAttribute("data-lm-suppress-shortcuts", "true"));
  find(".noUi-handle").forEach((handle) => {
    const row = handle.closest(".widget-slider"), shown = row.querySelector(".widget-readout");
    const tell = () => handle.ariaValueText === shown.textContent
      || (handle.ariaValueText = shown.textContent);
    handle.ariaLabel = row.querySelector(".widget-label").textContent;
    new MutationObserver(tell).observe(row, {subtree: true, childList: true, attributes: true});
    tell();
  });
})();
