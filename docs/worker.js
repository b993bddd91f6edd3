// Search from a folder: browsers start no worker from file://, so the script of the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      const loaded = new Promise((done) => (this.frame.onload = done));
      document.body.append(this.frame);
      this.ready = loaded.then(() => {
        const inside = this.frame.contentWindow;
        const load = (source) =>
          new Promise((done, failed) => {
            const script = inside.document.createElement("script");
            Object.assign(script, { src: source, onload: done, onerror: failed });
            inside.document.body.append(script);
          });
        inside.IFrameWorker = true;
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        inside.importScripts = async (...sources) => {
          for (const source of sources) await load(source);
        };
        return load(url);
      });
    }

    postMessage(data) {
      const inside = this.frame.contentWindow;
      this.ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
