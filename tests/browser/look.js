// What is wrong on the slide that reveal.js shows, a line each.
window.look = ([smallest, smallestScale]) => {
    const slide = Reveal.getCurrentSlide(), body = slide.querySelector(".body"), found = [];
    const clip = (text) => JSON.stringify(text.trim().slice(0, 40));
    const seen = (node) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    const over = (what, by) => by > 1 && found.push(`${what} by ${Math.ceil(by)} px`);
    over("higher than its place", body.scrollHeight - body.clientHeight);
    over("wider than its place", body.scrollWidth - body.clientWidth);
    over("higher than the slide", slide.scrollHeight - 1080);
    over("wider than the slide", slide.scrollWidth - 1920);
    slide.querySelectorAll(".fragment:not(.visible)").forEach((node) => {
        found.push(`${clip(node.textContent)} is never shown`);
    });

    const place = body.getBoundingClientRect();
    for (const element of body.querySelectorAll("*")) {
        const box = element.getBoundingClientRect(), name = element.tagName.toLowerCase();
        if (!box.width || !box.height || !seen(element)) continue;
        if (box.bottom > place.bottom + 1 || box.right > place.right + 1
            || box.left < place.left - 1 || box.top < place.top - 1)
            found.push(`<${name}> ${clip(element.textContent)} stands outside`);
        if (name === "img") {
            const scale = Math.min(box.width / element.naturalWidth,
                box.height / element.naturalHeight);
            if (scale < smallestScale) found.push(`a figure is scaled by ${scale.toFixed(2)} only`);
            if (!element.alt.trim()) found.push("a figure has no alternative text");
        }
    }

    const texts = document.createTreeWalker(slide, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || element.closest("aside, title, desc, style")
            || !seen(element)) continue;
        const scale = element.ownerSVGElement ? Math.abs(element.getScreenCTM().a) : 1;
        const size = parseFloat(getComputedStyle(element).fontSize) * scale;
        if (size < smallest - 0.1)
            found.push(`${clip(texts.currentNode.data)} is ${size.toFixed(1)} px high`);
    }
    return [...new Set(found)].slice(0, 6);
};
