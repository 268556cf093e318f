// What the tests ask of JupyterLab's page. The server exposes its application as `jupyterapp`.
const OUTPUTS = ".jp-OutputArea .widget-output .jp-OutputArea-output";

const lab = {
    notebook: () => jupyterapp.shell.currentWidget.content,
    cell: (index) => lab.notebook().widgets[index].node,
    contents: () => JSON.parse(JSON.stringify(lab.notebook().model)),
    session: () => jupyterapp.shell.currentWidget.sessionContext.session,

    ready: () => Boolean(window.jupyterapp?.shell.currentWidget?.content?.model?.cells.length
        && lab.session()?.kernel?.status === "idle"),

    // Starts the run, and does not wait for its end: `lab.ended` says when.
    run() {
        lab.ended = false;
        jupyterapp.commands.execute("runmenu:restart-and-run-all").finally(() => {
            lab.ended = true;
        });
    },

    // What a program of Python printed in the lesson's kernel.
    async python(code) {
        const future = lab.session().kernel.requestExecute({ code, store_history: false });
        let printed = "";
        future.onIOPub = ({ content }) => { printed += content.text ?? content.ename ?? ""; };
        await future.done;
        return printed;
    },

    // What is to be seen in the outputs below `node`: text, and pictures with all their bytes.
    seen: (node) => [...node.querySelectorAll(OUTPUTS)].map((output) => output.innerHTML
        .replace(/(id="|url\(#|href="#)[^")]*/g, "")).join("\n"),

    // From the next key on, note when the outputs below `node` become others.
    watch(node) {
        const before = lab.seen(node);
        const answer = { pressed: null, answered: null, last: null };
        const key = () => { answer.pressed ??= performance.now(); };
        const observer = new MutationObserver(async () => {
            answer.last = performance.now();
            const now = lab.seen(node);
            if (!now || now === before) return;
            await Promise.all([...node.querySelectorAll("img")].map((image) => image.decode()
                .catch(() => null)));                       // taken out again before it was decoded
            await new Promise(requestAnimationFrame);
            answer.answered = performance.now();
        });
        window.addEventListener("keydown", key, { capture: true, once: true });
        observer.observe(node, { childList: true, subtree: true, characterData: true,
            attributes: true, attributeFilter: ["src"] });
        lab.answer = answer;
        lab.unwatch = () => observer.disconnect();
    },

    // Milliseconds from the key to the last change on the screen; null if nothing changed.
    async answered(quiet = 200, limit = 5000) {
        const { answer } = lab;
        for (;;) {
            await new Promise((resolve) => setTimeout(resolve, 20));
            const now = performance.now();
            const settled = answer.answered && now - Math.max(answer.answered, answer.last) > quiet;
            if (settled || now - answer.pressed > limit) break;
        }
        lab.unwatch();
        return answer.answered && answer.answered - answer.pressed;
    },

    // Where a control stands; a button stands nowhere.
    state: (control) => control.getAttribute("aria-valuenow")
        ?? (control.tagName === "SELECT" ? String(control.selectedIndex)
            : control.type === "checkbox" || control.type === "radio" ? String(control.checked)
                : null),

    kind: (control) => (control.matches(".noUi-handle") ? "slider" : control.tagName === "SELECT"
        ? "dropdown" : control.type === "checkbox" ? "checkbox" : "button"),

    label: (control) => (control.closest(".widget-inline-hbox")?.querySelector(".widget-label")
        ?? control).textContent.trim(),

    // What a screen reader reads of a slider's handle, and what is to be seen beside it.
    told: (handle) => [handle.ariaLabel, handle.ariaValueText,
        handle.closest(".widget-slider").querySelector(".widget-readout").textContent],

    // Of the lesson, and of the part of it that the window shows.
    heights() {
        const outer = lab.notebook().node.querySelector(".jp-WindowedPanel-outer");
        const last = lab.notebook().widgets.at(-1).node;
        return [Math.ceil(last.getBoundingClientRect().bottom + outer.scrollTop
            - outer.getBoundingClientRect().top), outer.clientHeight];
    },

    pictures: () => [...lab.notebook().node.querySelectorAll(
        ".jp-OutputArea-output img, .jp-OutputArea-output svg, .jp-MarkdownOutput img")].map((node) => ({
        tag: node.tagName.toLowerCase(),
        text: (node.getAttribute("alt") ?? node.getAttribute("aria-label")
            ?? node.querySelector("title")?.textContent ?? "").trim(),
        cell: lab.notebook().widgets.findIndex((cell) => cell.node.contains(node)),
    })),

    headings: () => [...lab.notebook().node.querySelectorAll(":is(h1, h2, h3, h4, h5, h6)")].map(
        (node) => ({ level: Number(node.tagName[1]), text: node.textContent.replace("¶", "") })),
};
window.lab = lab;
