// What a fold cannot do by itself: open for a link that leads into it, and open with all others.
(() => {
  "use strict";
  const rooms = [...document.querySelectorAll("details.engine")];

  // Open whatever is folded around an element, and the room that it is the section of.
  function reveal(element) {
    element.querySelector(":scope > details.engine")?.setAttribute("open", "");
    for (let fold = element.closest("details"); fold; fold = fold.parentElement.closest("details"))
      fold.open = true;
  }

  function targetOf(hash) {
    try {
      return document.getElementById(decodeURIComponent(hash.slice(1)));
    } catch {
      return null; // a percent sign that encodes nothing
    }
  }

  // Where the address leads. What was folded had no place, so the way there starts anew.
  function follow() {
    const target = targetOf(location.hash);
    if (!target) return;
    reveal(target);
    target.scrollIntoView();
  }

  addEventListener("hashchange", follow);
  // A link to where one is already changes no address.
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href*='#']");
    if (!link || link.closest("summary") || link.href.split("#")[0] !== location.href.split("#")[0])
      return;
    const target = targetOf(link.hash);
    if (target) reveal(target);
  });

  // Words that the search has found: Sphinx marks them a hundredth of a second after the page is read.
  const marked = () => document.querySelectorAll("span.highlighted").forEach(reveal);
  addEventListener("load", () => setTimeout(marked, 100));

  const offer = document.querySelector(".engine-opener");
  if (offer && rooms.length) {
    const [button, count] = offer.children;
    const tell = () => {
      const open = rooms.filter((room) => room.open).length;
      button.textContent = open === rooms.length ? "Fold all engine rooms" : "Open all engine rooms";
      count.textContent = `${open} of ${rooms.length} open`;
    };
    button.addEventListener("click", () => {
      const open = rooms.some((room) => !room.open);
      for (const room of rooms) room.open = open;
      tell();
    });
    document.addEventListener("toggle", tell, true); // toggle does not bubble
    tell();
    offer.hidden = false;
  }

  follow();
})();
