() => {
    // A place without a picture gets the role that its label needs.
    const name = () => document.querySelectorAll("div.empty[aria-label]").forEach(x => x.setAttribute("role", "img"));
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();

    // The stopwatch of gradio's first "Loading" is never stopped: it asks for the next of sixty frames a second for as
    // long as the page is open. It took the function before us, so what asks through ours is something else, and while
    // nothing else waits for a frame, all that wait are dropped.
    const ask = window.requestAnimationFrame.bind(window);
    let others = 0;
    window.requestAnimationFrame = call => {
        others++;
        return ask(time => { others--; call(time); });
    };
    const drop = () => {
        if (others > 0) { setTimeout(drop, 1000); return; }
        for (let frame = ask(() => {}); frame > 0; frame--) cancelAnimationFrame(frame);
    };
    setTimeout(drop, 3000);
}
